import itertools
import time

import pytest

from digit.data.sampling import map_ahead


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_results_come_in_order_and_at_most_so_many_are_made_ahead(workers):
    begun = []

    def square(i):
        begun.append(i)
        time.sleep(0.001 * (i % 3))
        return i * i

    results = map_ahead(square, itertools.count(), workers, ahead=5)
    for i, found in enumerate(itertools.islice(results, 30)):
        assert found == i * i
        assert len(begun) <= i + 1 + 5
    results.close()  # of an endless map


def test_what_a_thread_raises_comes_out_in_its_turn():
    results = map_ahead(lambda i: 1 // (2 - i), range(5), workers=2, ahead=4)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
