"""One rank of a start that reads its data: `python -m tests.ranks.cache_worker CONFIG RANK` prints what it took."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kd_plugin.data import documents
from kd_plugin.data.packing import Document
from kd_plugin.data.record import Record
from kd_plugin.settings.yaml_file import load_config
from kd_plugin.training.tokenizers import tokenizer_of

_COUNTED = 0


def _counting(records: Iterable[Record]) -> Iterator[Record]:
    global _COUNTED
    for record in records:
        _COUNTED += 1
        yield record


def main(config_file: str, rank: str) -> None:
    """Load the data as `kd_plugin.train` does, and print the seconds, a digest and the number of records tokenised."""
    encode = documents.encode

    def counted(records: Iterable[Record], *given: Any) -> Iterator[Document | str | None]:
        return encode(_counting(records), *given)

    documents.encode = counted
    config = load_config(Path(config_file))
    tokenizer = tokenizer_of(config)
    start, cpu = time.perf_counter(), time.process_time()
    train, held_out = documents.load_datasets(config.data, tokenizer, -100, seed=config.train.seed)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    digest = hashlib.sha256()
    num_tokens = 0
    for dataset in (train, held_out):
        for index in range(len(dataset)):
            item = dataset[index]
            num_tokens += len(item["input_ids"])
            digest.update(item["input_ids"].tobytes() + item["labels"].tobytes())
    times = {"seconds": seconds, "cpu_seconds": cpu_seconds}
    print(
        json.dumps({"rank": rank, **times, "tokenised": _COUNTED, "tokens": num_tokens, "digest": digest.hexdigest()})
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
