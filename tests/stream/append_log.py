"""Appends to a log until it is killed. Arguments: the log's folder, and messages a flush. Prints what is flushed."""

import sys
from pathlib import Path

from monolith_jax.stream.file_producer import FileProducer
from monolith_jax.stream.log import LogPartition

if __name__ == "__main__":
    producer = FileProducer(Path(sys.argv[1]), {"segment_bytes": "100000", "fsync_s": "inf"})
    producer.create("events", 1)
    partition = LogPartition("events", 0)
    while True:
        for _ in range(int(sys.argv[2])):
            offset = producer.next_offset(partition)
            producer.append(partition, b"%d," % offset * (offset % 50), offset)
        producer.flush()
        print(producer.next_offset(partition), flush=True)
