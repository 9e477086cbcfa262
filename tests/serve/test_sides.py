"""Two copies that change places while threads read."""

import threading
import time

from monolith_jax.serve.sides import Sides


def test_a_swap_waits_for_readers_of_the_old_copy_only() -> None:
    sides = Sides(["old"], ["new"])
    inside, leave, swapped = threading.Event(), threading.Event(), threading.Event()
    seen: list[str] = []

    def slow() -> None:
        with sides.read() as copy:
            inside.set()
            leave.wait(10)
            seen.append(copy[0])

    def swap() -> None:
        assert sides.swap() == ["old"]
        swapped.set()

    threads = [threading.Thread(target=slow), threading.Thread(target=swap)]
    threads[0].start()
    assert inside.wait(10)
    threads[1].start()
    deadline = time.monotonic() + 10
    while sides.live != ["new"] and time.monotonic() < deadline:
        time.sleep(0.001)
    with sides.read() as copy:  # Does not wait, though the swap does.
        assert copy == ["new"]
    assert not swapped.is_set()
    leave.set()
    for thread in threads:
        thread.join(10)
    assert swapped.is_set() and seen == ["old"]


def test_readers_never_see_a_copy_that_is_changed() -> None:
    sides = Sides([0] * 50, [0] * 50)
    stop, torn = threading.Event(), list[list[int]]()

    def read() -> None:
        while not stop.is_set():
            with sides.read() as copy:
                seen = [copy[place] for place in range(50)]
            if len(set(seen)) > 1:
                torn.append(seen)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(1, 200):
        for copy in (sides.idle, None):
            target = sides.swap() if copy is None else copy
            for place in range(50):
                target[place] = number
    stop.set()
    for thread in threads:
        thread.join(10)
    assert not torn and set(sides.live) == set(sides.idle) == {199}
