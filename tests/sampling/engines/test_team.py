"""The number of threads follows the time that steps take."""

from digit.sampling.engines.team import LONGEST, STAY, TRIAL, WINDOW, Team


def steps(team: Team, seconds: dict[int, float], count: int) -> list[int]:
    """The threads of so many steps, which take so many seconds with so many threads."""
    used = []
    for _ in range(count):
        used.append(team.count)
        team.took(1, seconds[team.count])
    return used


def settled() -> Team:
    """Two threads that nothing has disturbed so far."""
    team = Team(2)
    steps(team, {2: 1.0, 1: 1.9}, WINDOW + TRIAL)
    return team


def test_alone_all_threads_step():
    team = Team(4)
    assert steps(team, {4: 1.0, 2: 1.9}, 1000) == [4] * WINDOW + [2] * TRIAL + [4] * (1000 - WINDOW - TRIAL)
    for i in range(1000):  # as attention makes them
        team.took(1, 1 + 0.4 * i / 1000)
        assert team.count == 4


def test_beside_another_program_fewer_step_until_it_ends():
    team = settled()
    beside = {2: 3.0, 1: 1.9}
    assert steps(team, beside, WINDOW) == [2] * WINDOW  # seen
    assert steps(team, beside, TRIAL + STAY) == [1] * (TRIAL + STAY)  # tried, and kept
    assert steps(team, beside, TRIAL) == [2] * TRIAL  # is it over?
    assert steps(team, beside, 2 * STAY) == [1] * 2 * STAY  # no: it is asked less often
    assert steps(team, {2: 1.0, 1: 1.9}, TRIAL + 32 * WINDOW) == [2] * (TRIAL + 32 * WINDOW)  # it is
    used = steps(team, beside, WINDOW + TRIAL + STAY + TRIAL)  # and begins anew
    assert used == [2] * WINDOW + [1] * (TRIAL + STAY) + [2] * TRIAL


def test_beside_another_program_all_threads_are_tried_seldom():
    team = settled()
    used = steps(team, {2: 3.0, 1: 1.9}, 20_000)
    assert 0.98 < used.count(1) / len(used) < 1 - TRIAL / (TRIAL + LONGEST)


def test_fewer_threads_that_are_slower_are_given_up():
    team = settled()
    used = steps(team, {2: 1.8, 1: 1.9}, 2 * (WINDOW + TRIAL))
    assert used == ([2] * WINDOW + [1] * TRIAL) * 2


def test_begun_beside_another_program():
    team, beside = Team(2), {2: 3.0, 1: 1.9}
    used = steps(team, beside, WINDOW + TRIAL + STAY + TRIAL + 2 * STAY)
    assert used == [2] * WINDOW + [1] * (TRIAL + STAY) + [2] * TRIAL + [1] * 2 * STAY


def test_one_thread_is_one_thread():
    assert steps(Team(1), {1: 1.0}, 100) == [1] * 100
