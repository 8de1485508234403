"""Describe the photographs of a source ahead of its build, in several processes or on several GPUs.

    accelerate launch -m data_prep.embed --config FILE [--key value ...]
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 -m data_prep.embed --config FILE [--key value ...]

FILE is the config of a build; `cache` says where the features go, from where builds with that cache take them. Each
process describes its share of the photographs, and writes their features in shards that are whole or absent: killed, it
goes on with any number of processes and describes nothing again that is in a shard. What is kept is kept by content: a
photograph that has changed is described anew.
"""

from __future__ import annotations

from data_prep.collect import check_config, source_items
from data_prep.config import BuildConfig
from data_prep.progress import progress
from echo_ft.config import parse, run_main
from echo_ft.errors import EchoError
from echo_ft.processes import join_processes
from echo_ft.records import Inspection
from echo_ft.retrieval.descriptor_cache import DescriptorCache, describe_new, hash_files
from echo_ft.retrieval.descriptors import describer


def main(argv: list[str]) -> None:
    """Command line: describe this process's share and say what was done."""
    (config,) = parse([BuildConfig], argv)
    embed(config)


def embed(config: BuildConfig) -> None:
    """Describe what the config's cache lacks, this process its share; the first says what all of them did.

    Raises EchoError without a cache, for a source that draws, and for a config that cannot be built.
    """
    from accelerate.utils import gather_object

    if config.cache is None:
        raise EchoError("there is nowhere to keep the features; give --cache DIR, and the same to data_prep.build")
    if config.source == "synthetic":
        raise EchoError("the source synthetic draws its photographs when a dataset is built; there are none before")
    check_config(config)
    describe = describer(config.descriptor)
    state = join_processes()
    root, items = source_items(config, config.output)
    inspections = [item for item in items if isinstance(item, Inspection)]
    named = {path for one in inspections for path in (one.image, one.reference) if path is not None}
    share = sorted(named)[state.process_index :: state.num_processes]
    hashes, missing = hash_files(share, root)
    store = DescriptorCache(describe, config.cache)
    known = store.known()
    broken: dict[str, str] = {}
    for faults in progress(describe_new(hashes, root, describe, store), "describing", "shards"):
        broken |= faults
    before = sum(digest in known for digest in hashes.values())
    unread = len(missing) + sum(digest in broken for digest in hashes.values())
    counts = gather_object([(len(share), before, unread)])
    if state.is_main_process:
        photographs, before, unread = map(sum, zip(*counts, strict=True))
        print(f"{photographs} photographs, {before} of them described before, in {store.folder}")
        if unread:
            print(f"{unread} cannot be read; the build says which and why")
    state.destroy_process_group()


if __name__ == "__main__":
    run_main(main, "the same command goes on where it stopped")
