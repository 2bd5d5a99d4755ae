// Threads that share a piece of work, and do not wait for one that has lost its core to another program.
//
// Why not OpenMP: where its threads wait they spin for milliseconds, and every one waits for the last. A network of eight layers has forty
// such places a token; on a machine with other programs the last is often not running at all.

#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
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

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

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
            pause();
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
        uint64_t phase;  // of the last shared tasks; all threads count alike, for all come to the same calls of share()

        // Tasks 0 to count - 1, shared by the threads. ``compute(i)`` works one out in memory of this thread alone, ``commit(i)`` hands it
        // over; ``begin()`` comes before the first. Each task is handed over once, and nobody goes on before all are. But a task whose thread
        // has lost its core is computed by another, and what the first one brings later is dropped: by then it may have read what others
        // were overwriting, and no more than memory of its own has come of it. Whoever still is first has read what stays as it is
        // until all tasks are handed over.
        template <class Begin, class Compute, class Commit>
        void share(int64_t count, const Begin& begin, const Compute& compute, const Commit& commit) {
            if (all > 1) return team->share(*this, count, begin, compute, commit);
            begin();
            for (int64_t i = 0; i < count; i++) compute(i), commit(i);
        }
    };
    using Work = std::function<void(Member&)>;

    // Run work(member) in ``threads`` threads, which share at most ``tasks`` tasks at a time. Where others are at work already, the caller
    // runs it alone.
    static void run(int threads, int64_t tasks, const Work& work) {
        if (threads > 1) {
            Team& team = get();
            const std::unique_lock<std::mutex> hold(team.busy, std::try_to_lock);
            if (hold.owns_lock() && team.grow(threads, tasks)) return team.call(threads, work);
        }
        Member alone{nullptr, 0, 1, 0};
        work(alone);
    }

private:
    std::mutex busy;
    std::vector<std::unique_ptr<Counter>> calls;  // of each thread but the first
    std::unique_ptr<std::atomic<uint64_t>[]> states, places;  // of each task, see share(); of each thread, the phase where it is
    int64_t most_tasks = 0;
    std::atomic<uint64_t> finished{0};  // the last phase whose tasks are all handed over
    uint64_t first = 0;                 // the phase before this call
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

    // Whether there are as many threads, and room for as many tasks. None is at work now.
    bool grow(int threads, int64_t tasks) {
        try {
            if (int(calls.size()) < threads - 1) places.reset(new std::atomic<uint64_t>[threads]());
            while (int(calls.size()) < threads - 1) {
                auto call = std::make_unique<Counter>();
                std::thread(&Team::serve, this, int(calls.size()) + 1, call.get()).detach();
                calls.push_back(std::move(call));
            }
            if (most_tasks < tasks) states.reset(new std::atomic<uint64_t>[tasks]()), most_tasks = tasks;
            return true;
        } catch (const std::system_error&) {  // the system gives no more
            return false;
        }
    }

    void call(int threads, const Work& what) {
        work = &what, all = threads, first = finished.load();
        for (int i = 0; i < threads - 1; i++) calls[i]->increase();
        Member caller{this, 0, threads, first};
        what(caller);
        meet(threads);
    }

    void serve(int me, Counter* call) {
        for (uint32_t seen = 0;; seen++) {
            call->wait(seen);
            const int count = all;
            Member member{this, me, count, first};
            (*work)(member);
            meet(count);
        }
    }

    void meet(int count) {
        const uint32_t before = meeting.now();
        if (arrived.fetch_add(1) + 1 < count) return meeting.wait(before);
        arrived.store(0);
        meeting.increase();
    }

    // A task's state is below 2 x phase until a thread begins to hand it over, then that, and one more afterwards.
    template <class Begin, class Compute, class Commit>
    void share(Member& member, int64_t count, const Begin& begin, const Compute& compute, const Commit& commit) {
        using Clock = std::chrono::steady_clock;
        const uint64_t phase = ++member.phase, taken = 2 * phase;
        const int me = member.me, threads = member.all;
        places[me].store(phase);
        if (finished.load() >= phase) return;
        const auto attempt = [&](int64_t i) {
            uint64_t seen = states[i].load();
            if (seen >= taken) return;
            compute(i);
            if (seen = states[i].load(); seen >= taken || !states[i].compare_exchange_strong(seen, taken)) return;
            commit(i);
            states[i].store(taken + 1);
        };
        const auto began = Clock::now();
        begin();
        const int64_t mine = count * me / threads, end = count * (me + 1) / threads;
        for (int64_t i = mine; i < end; i++) attempt(i);

        // now the others' tasks: at once what they have not come to, last ones first; what they are at after some patience
        const auto spent = Clock::now() - began;
        const auto patience = std::max<Clock::duration>(std::chrono::microseconds(5), 2 * spent / std::max<int64_t>(1, end - mine));
        const auto late = began + spent + patience;
        for (int spins = 0;; spins++) {
            if (finished.load() >= phase) return;
            int64_t open = 0, next = -1;
            const bool impatient = spins % 16 == 15 && Clock::now() > late;
            for (int other = 0; other < threads && next < 0; other++) {
                int64_t here = 0, last = -1;
                for (int64_t i = count * other / threads; i < count * (other + 1) / threads; i++) {
                    const uint64_t state = states[i].load();
                    if (state <= taken) open++;
                    if (state < taken) here++, last = i;
                }
                if (here > 1 || (here && (impatient || places[other].load() < phase))) next = last;
            }
            if (next >= 0) {
                attempt(next);
            } else if (!open) {
                break;
            } else if (impatient) {  // a thread has lost its core while it handed over, which takes no time otherwise
                std::this_thread::yield();
            } else {
                pause();
            }
        }
        uint64_t before = finished.load();
        while (before < phase && !finished.compare_exchange_weak(before, phase)) {}
    }
};

}  // namespace digit
