"""What a round of heartbeats costs the store where the ranks met, by the number of ranks: `python FILE [RANKS ...]`.

A real TCPStore serves from this process. Another process lets all ranks beat in turn by the code of a run, over one
connection (a run has one a rank). The figures are this process's CPU seconds for a round, in which each rank reads and
sends once, and their ratio a rank to the first line's. Fair: the same server, nothing else in its process. Ranks beat
every 3 seconds, so a store that is busy for less can serve them.
"""

import multiprocessing
import sys
import time

from torch.distributed import TCPStore

from trainer.watching.heartbeats import RUNNING, Heartbeats

ROUNDS = 3


def beat(port: int, count: int, pipe) -> None:
    """All ranks beat `ROUNDS` times, after a first round in which they meet."""
    store = TCPStore("127.0.0.1", port, None, False)
    ranks = [Heartbeats(store, rank, count) for rank in range(count)]
    for number in range(1 + ROUNDS):
        for rank in ranks:
            rank.read()
            rank.send(number, step=100, phase="computing", done=5, state=RUNNING, waits=True)
        pipe.send(number)
        pipe.recv()


def measure(count: int) -> float:
    """CPU seconds of the store for a round of `count` ranks."""
    server = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=beat, args=(server.port, count, there))
    process.start()
    here.recv()
    started = time.process_time()
    for _ in range(ROUNDS):
        here.send(None)
        here.recv()
    used = time.process_time() - started
    here.send(None)
    process.join()
    return used / ROUNDS


def main(counts: list[int]) -> None:
    first = None
    for count in counts:
        used = measure(count)
        first = first or used / count
        print(f"{count:5d} ranks: {used:.3f} CPU seconds of the store a round, {used / count / first:.2f} a rank")


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or [128, 512, 1024])
