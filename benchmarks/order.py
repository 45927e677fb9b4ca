"""Cost of the elastic order: permutation of an epoch, seek, and time per sample.

python -m benchmarks.order --samples 100000000
"""

import argparse
import sys
import time

import numpy as np

from data_pipeline.order import CHUNK_SAMPLES, Chunks, EpochOrder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=100_000_000)
    parser.add_argument("--streams", type=int, default=1024)
    args = parser.parse_args()
    first = np.arange(0, args.samples, CHUNK_SAMPLES, dtype=np.int64)
    chunks = Chunks(first, np.minimum(CHUNK_SAMPLES, args.samples - first))
    began = time.perf_counter()
    order = EpochOrder(chunks, seed=1, epoch=0, streams=args.streams, window=1024)
    built = time.perf_counter()
    middle = args.samples // 2
    order.at(middle)
    sought = time.perf_counter()
    count = 4 * args.streams
    for i in range(count):
        order.at((middle + i) % args.samples)
    ended = time.perf_counter()
    size = sum(a.nbytes for a in (chunks.first, chunks.size, order._first, order._ends))
    print(f"{args.samples:,} samples, {len(chunks.first):,} chunks, {size / 1e6:.0f} MB")
    print(f"permutation of an epoch {built - began:.2f} s, seek {1e3 * (sought - built):.2f} ms")
    print(f"{1e6 * (ended - sought) / count:.1f} us a sample over {count:,} samples")
    return 0


if __name__ == "__main__":
    sys.exit(main())
