// Threads that share a piece of work and wait for each other.
//
// Why not OpenMP: its threads spin for milliseconds where they wait. On a machine with other programs they then keep a core from
// the thread that they wait for. These spin for some microseconds and sleep after that.

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include <unistd.h>

namespace digit {

// A number that grows, to wait on.
class Counter {
public:
    uint32_t now() const { return value.load(std::memory_order_acquire); }

    void increase() {
        value.fetch_add(1);
        if (!sleepers.load()) return;
        { std::lock_guard<std::mutex> hold(mutex); }  // a thread on its way to sleep has arrived there
        changed.notify_all();
    }

    // Return once the number is no longer ``old``.
    void wait(uint32_t old) {
        for (int i = 0; i < SPINS; i++) {
            if (now() != old) return;
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
        std::unique_lock<std::mutex> hold(mutex);
        sleepers.fetch_add(1);
        changed.wait(hold, [&] { return value.load() != old; });
        sleepers.fetch_sub(1);
    }

private:
    static constexpr int SPINS = 200;  // 3 to 10 microseconds
    std::atomic<uint32_t> value{0};
    std::atomic<int> sleepers{0};
    std::mutex mutex;
    std::condition_variable changed;
};

// The threads of this process; the caller is the first of them.
class Team {
public:
    // One of the threads at work.
    struct Member {
        Team* team;
        int me, all;

        // Each thread waits here for the others.
        void barrier() const {
            if (all > 1) team->meet(all);
        }
    };
    using Work = std::function<void(const Member&)>;

    // Run work(member) in ``threads`` threads. Where others are at work already, the caller runs it alone.
    static void run(int threads, const Work& work) {
        if (threads > 1) {
            Team& team = get();
            const std::unique_lock<std::mutex> hold(team.busy, std::try_to_lock);
            if (hold.owns_lock() && team.grow(threads)) return team.share(threads, work);
        }
        work({nullptr, 0, 1});
    }

private:
    std::mutex busy;
    std::vector<std::unique_ptr<Counter>> calls;  // of each thread but the first
    Counter meeting;
    std::atomic<int> arrived{0};
    const Work* work = nullptr;
    int all = 1;
    const pid_t process = getpid();

    static Team& get() {  // never deleted: at exit its threads may still sleep
        static std::atomic<Team*> current{nullptr};
        Team* team = current.load();
        if (team && team->process == getpid()) return *team;
        Team* fresh = new Team;  // the first, or that of a forked process, which has no threads yet
        if (current.compare_exchange_strong(team, fresh)) return *fresh;
        delete fresh;
        return *team;
    }

    // Whether there are as many threads.
    bool grow(int threads) {
        try {
            while (int(calls.size()) < threads - 1) {
                auto call = std::make_unique<Counter>();
                std::thread(&Team::serve, this, int(calls.size()) + 1, call.get()).detach();
                calls.push_back(std::move(call));
            }
            return true;
        } catch (const std::system_error&) {  // the system gives no more
            return false;
        }
    }

    void share(int threads, const Work& what) {
        work = &what, all = threads;
        for (int i = 0; i < threads - 1; i++) calls[i]->increase();
        what({this, 0, threads});
        meet(threads);
    }

    void serve(int me, Counter* call) {
        for (uint32_t seen = 0;; seen++) {
            call->wait(seen);
            const int count = all;
            (*work)({this, me, count});
            meet(count);
        }
    }

    void meet(int count) {
        const uint32_t before = meeting.now();
        if (arrived.fetch_add(1) + 1 < count) return meeting.wait(before);
        arrived.store(0);
        meeting.increase();
    }
};

}  // namespace digit
