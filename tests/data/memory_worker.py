"""A process that loads its data and says what memory it took: `python -m tests.data.memory_worker SOURCE CACHE`."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from pathlib import Path

from kd_plugin.data.documents import load_datasets
from kd_plugin.settings.run import DataConfig
from tests.chat_data import make_tokenizer, write_jsonl


def memory(field: str) -> int:
    """Bytes of this process as the system counts them: `VmRSS`, its peak `VmHWM`, or `RssAnon`, without files."""
    [kilobytes] = re.findall(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return 1024 * int(kilobytes)


def load(source: str, cache: str) -> None:
    """Load `source`, read every sequence, and print what that took beyond what an import takes."""
    begin, before = time.perf_counter(), memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    datasets = load_datasets(DataConfig(train=source, cache=cache), make_tokenizer(), -100, seed=0)
    seconds, peak, anonymous = time.perf_counter() - begin, memory("VmHWM") - before, memory("RssAnon")
    digest, most = hashlib.sha256(), 0
    for dataset in datasets:
        for index in range(len(dataset)):
            item = dataset[index]
            digest.update(item["input_ids"].tobytes() + item["labels"].tobytes())
            if index % 1000 == 0:
                most = max(most, memory("RssAnon") - anonymous)
    sizes = {"documents": sum(len(each.documents) for each in datasets), "tokens": datasets[0].num_tokens}
    print(json.dumps({**sizes, "seconds": seconds, "peak": peak, "reading": most, "digest": digest.hexdigest()}))


if __name__ == "__main__":
    small = write_jsonl(Path(sys.argv[2]) / "small.jsonl", *({"text": "a b " * number} for number in range(600, 609)))
    load_datasets(DataConfig(train=small, cache=sys.argv[2]), make_tokenizer(), -100, seed=0)  # imports everything
    load(*sys.argv[1:])
