"""Compute the image descriptors of a source ahead of its build, in several processes or on several GPUs.

    python -m train.launch -m data_prep.embed --config FILE [--key value ...]
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 -m data_prep.embed --config FILE [--key value ...]

FILE is the config of a build. The descriptors go into the folder `cache`, and builds with the same cache read them from
there. Each process handles its part of the images and writes descriptors in shards that are either complete or absent.
If the command is killed, rerun it with any number of processes to resume; finished shards are not recomputed. The cache
is keyed by file content, so the descriptor of a changed image is recomputed.
"""

from __future__ import annotations

from data_prep.collect import check_config, source_items
from data_prep.config import BuildConfig
from echo_ft.config import parse, run_main
from echo_ft.errors import EchoError
from echo_ft.processes import join_processes
from echo_ft.records import Inspection
from echo_ft.retrieval.descriptor_cache import DescriptorCache, extract_missing, hash_files
from echo_ft.retrieval.descriptors import load_extractor
from echo_ft.terminal import progress


def main(argv: list[str]) -> None:
    """Compute this process's part of the descriptors and print a summary."""
    (config,) = parse([BuildConfig], argv)
    embed(config)


def embed(config: BuildConfig) -> None:
    """Compute this process's part of the descriptors that the cache lacks. The first process prints the full summary.

    Raises EchoError if no cache is given, if the source draws its images, or if the config cannot be built.
    """
    from accelerate.utils import gather_object

    if config.cache is None:
        raise EchoError("no cache folder is given; add --cache DIR here and to data_prep.build")
    if config.source == "synthetic":
        raise EchoError("the source synthetic draws its images during the build; run data_prep.build directly")
    check_config(config)
    extractor = load_extractor(config.descriptor)
    state = join_processes()
    source, items = source_items(config, config.output)
    inspections = [item for item in items if isinstance(item, Inspection)]
    paths = {path for one in inspections for path in (one.image, one.reference) if path is not None}
    share = sorted(paths)[state.process_index :: state.num_processes]
    hashes, missing = hash_files(share, source.root)
    store = DescriptorCache(extractor, config.cache)
    known = store.known()
    unreadable: dict[str, str] = {}
    for faults in progress(extract_missing(hashes, source.root, extractor, store), "computing descriptors", "shards"):
        unreadable |= faults
    cached = sum(digest in known for digest in hashes.values())
    failed = len(missing) + sum(digest in unreadable for digest in hashes.values())
    counts = gather_object([(len(share), cached, failed)])
    if state.is_main_process:
        images, cached, failed = map(sum, zip(*counts, strict=True))
        print(f"{images} images, {cached} of them already in the cache {store.folder}")
        if failed:
            print(f"unreadable images: {failed}; the build lists them with the reasons")
    state.destroy_process_group()


if __name__ == "__main__":
    run_main(main, "rerun the same command to resume")
