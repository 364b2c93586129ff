"""The Beam pipeline of `beam_ingest`: its transforms, and what they do to elements.

It checks the spans of the source, finds equal images and equal captions by grouping, numbers what
is kept in the order of the source, and writes the plan and the image shards. No worker sees all
items. The images themselves are not shuffled: a worker reads them again when it writes their shard.

Grouping loses the order, so positions are carried along: (index of the item in the source, place
within the item). Consecutive items are sorted and numbered together, in blocks; the numbers of a
block begin where those of the blocks before it end.
"""

import dataclasses
import itertools
import json
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam

from imagen_jax.data.prepare import ingest, kept
from imagen_jax.data.prepare.checks import Checked
from imagen_jax.data.prepare.kept import SKIPPED, KeptImage
from imagen_jax.data.prepare.resize import Resize
from imagen_jax.data.prepare.shards import finished, shard_of, write_images
from imagen_jax.data.records import SPLITS
from imagen_jax.data.sources.source import Source
from imagen_jax.storage import write_atomically, write_lines

OF_ITEM, MERGED, REPEATED = range(3)  # the order of the lines of skipped.jsonl for one item
LINES, USES = "lines", "uses"  # side outputs
ALL = ""  # in the place of a split: captions are numbered across splits
PART = 16 * ingest.CHUNK  # items that one worker checks in a row
TOKEN = "token"  # in the directory of the plan, until it is complete
SUMMARY = "summary.json"  # in the directory of the plan, until it is complete
Line = tuple[tuple[int, int, int], dict]  # ((index of the item, kind, place), line)


class Occurrence(NamedTuple):
    """One occurrence of a caption: of item `index`, at `place` among its captions.

    image: index of the first item with the same pixels. id: of the item.
    """

    index: int
    place: int
    image: int
    id: str
    text: str


class Numbers(NamedTuple):
    """Where the numbers of each block begin, by split for images, and the totals."""

    begins: Mapping[Any, int]
    totals: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Tasks:
    """What workers do, with all that they need.

    partial: the work directory. shard_size, min_size, resize: as in `settings.Settings`.
    block: number of consecutive items that are sorted and numbered together.
    token: content of the file TOKEN in the work directory.
    """

    source: Source
    partial: Path
    shard_size: int
    min_size: int
    resize: Resize
    block: int
    token: str

    def plan_directory(self) -> Path:
        """The directory of the plan. Raises ValueError if it is not the one that all share."""
        try:
            shared = (self.partial / "plan" / TOKEN).read_text() == self.token
        except FileNotFoundError:
            shared = False
        if not shared:
            raise ValueError(
                f"{self.partial} is another directory on the worker {socket.gethostname()} than on"
                " the machine that started the pipeline: mount the shared file system there"
            )
        return self.partial / "plan"

    def check(self, span: ingest.Span) -> Iterator[tuple[int, Checked]]:
        """(index, result) of the items of a span, from its file if that is there already."""
        self.plan_directory()
        file = span.file(self.partial)
        if not file.is_file():
            ingest.check_span(self.source, self.partial, span, self.min_size, self.resize)
        return zip(
            range(span.start, span.stop), ingest.read_checked(self.partial, span), strict=True
        )

    def write_lines(self, block: int, lines: Iterable[Line]) -> None:
        """Writes the lines of a block for skipped.jsonl."""
        path = self.plan_directory() / f"{block:09d}-{SKIPPED}"
        ordered = sorted(lines, key=lambda line: line[0])
        write_lines(path, (json.dumps(line) + "\n" for _, line in ordered))

    def write_captions(self, shard: int, captions: Iterable[tuple[int, str]]) -> None:
        """Writes the captions (number, text) of a shard to the plan."""
        texts = [text for _, text in sorted(captions)]
        kept.write_captions_of(self.plan_directory(), shard, texts)

    def write_images(
        self,
        grouped: tuple[tuple[str, int], Iterable[tuple[int, KeptImage]]],
        numbers: Numbers,
    ) -> None:
        """Writes the images of a shard to the plan, and the shard itself.

        grouped: ((split, number of the shard), (number, image) of each image).
        """
        (split, number), images = grouped
        rows = [image for _, image in sorted(images, key=lambda numbered: numbered[0])]
        kept.write_images_of(self.plan_directory(), split, number, rows)
        shard = shard_of("images", split, number, numbers.totals[split], self.shard_size)
        if not finished(self.partial, shard):
            write_images(self.source, self.partial, shard, self.resize)

    def write_summary(
        self,
        _: None,
        images: Numbers,
        captions: Numbers,
        reasons: Mapping[str, int],
        examples: Mapping[str, tuple],
        sizes: Mapping[str, float],
        blocks: int,
    ) -> None:
        """Writes what `_complete` needs of all items."""
        content = {
            "images": {split: images.totals.get(split, 0) for split in SPLITS},
            "captions": captions.totals.get(ALL, 0),
            "reasons": reasons,
            "examples": {reason: text for reason, (_, text) in examples.items()},
            "sizes": sizes,
            "blocks": blocks,
        }
        write_atomically(self.plan_directory() / SUMMARY, json.dumps(content).encode())


def build(pipeline: beam.Pipeline, tasks: Tasks) -> None:
    """Adds the transforms to a pipeline."""
    size, block = tasks.shard_size, tasks.block
    checked = (
        pipeline
        | "shards" >> beam.Create(ingest.shard_bounds(tasks.source))
        | "parts" >> beam.FlatMapTuple(_parts)
        | "spread parts" >> beam.Reshuffle()
        | "spans" >> beam.FlatMapTuple(ingest.spans_between)
        | "check" >> beam.FlatMap(tasks.check)
    )
    of_items = checked | "lines of items" >> beam.FlatMapTuple(_lines_of_item)
    merged = (
        checked
        | "usable" >> beam.Filter(lambda indexed: not indexed[1].reason)
        | "by pixels" >> beam.Map(lambda indexed: (indexed[1].pixels, indexed))
        | "equal images" >> beam.GroupByKey()
        | "merge" >> beam.FlatMapTuple(_merge).with_outputs(LINES, USES, main="images")
    )
    distinct = (
        merged[USES]
        | "by text" >> beam.Map(lambda use: (kept.caption_digest(use.text), use))
        | "equal captions" >> beam.GroupByKey()
        | "repeated" >> beam.FlatMapTuple(_repeat).with_outputs(LINES, main="captions")
    )
    lines = (of_items, merged[LINES], distinct[LINES]) | "lines" >> beam.Flatten()
    _ = (
        lines
        | "lines by block" >> beam.Map(lambda line: (line[0][0] // block, line))
        | "lines of block" >> beam.GroupByKey()
        | "write lines" >> beam.MapTuple(tasks.write_lines)
    )
    caption_numbers = _count(distinct.captions, "captions", lambda use: (ALL, use.index // block))
    image_numbers = _count(
        merged.images, "images", lambda indexed: (indexed[1].split, indexed[0] // block)
    )
    numbered = (
        distinct.captions
        | "captions by block" >> beam.Map(lambda use: (use.index // block, use))
        | "captions of block" >> beam.GroupByKey()
        | "number captions"
        >> beam.FlatMap(_number_captions, numbers=beam.pvalue.AsSingleton(caption_numbers))
    )
    _ = (
        numbered
        | "captions by shard" >> beam.MapTuple(lambda n, use: (n // size, (n, use.text)))
        | "captions of shard" >> beam.GroupByKey()
        | "write captions" >> beam.MapTuple(tasks.write_captions)
    )
    references = _references(merged[USES], numbered, block)
    _ = (
        (
            merged.images | "images by block" >> beam.Map(lambda image: (image[0] // block, image)),
            references,
        )
        | "images with captions" >> beam.CoGroupByKey()
        | "number images"
        >> beam.FlatMap(_number_images, size=size, numbers=beam.pvalue.AsSingleton(image_numbers))
        | "images of shard" >> beam.GroupByKey()
        | "write images"
        >> beam.Map(tasks.write_images, numbers=beam.pvalue.AsSingleton(image_numbers))
    )
    _summarize(pipeline, tasks, merged.images, lines, image_numbers, caption_numbers)


def _references(uses: Any, numbered: Any, block: int) -> Any:
    """(block, (image, index, place, number of the caption)) of all uses of captions."""
    return (
        (
            uses | "uses by text" >> beam.Map(lambda use: (kept.caption_digest(use.text), use[:3])),
            numbered
            | "numbers by text" >> beam.MapTuple(lambda n, use: (kept.caption_digest(use.text), n)),
        )
        | "uses with numbers" >> beam.CoGroupByKey()
        | "references" >> beam.FlatMap(_refer, block=block)
    )


def _summarize(
    pipeline: beam.Pipeline,
    tasks: Tasks,
    images: Any,
    lines: Any,
    image_numbers: Any,
    captions: Any,
) -> None:
    reasons = (
        lines
        | "reasons" >> beam.Map(lambda line: (line[1]["reason"], 1))
        | "count reasons" >> beam.CombinePerKey(sum)
    )
    examples = (
        lines
        | "named" >> beam.Map(lambda at: (at[1]["reason"], (at[0], kept.example(at[1]))))
        | "examples" >> beam.CombinePerKey(min)
    )
    blocks = (
        lines
        | "blocks" >> beam.Map(lambda line: line[0][0] // tasks.block)
        | "distinct blocks" >> beam.Distinct()
        | "count blocks" >> beam.combiners.Count.Globally()
    )
    sizes = (
        images
        | "sides" >> beam.Map(lambda indexed: (indexed[1].height, indexed[1].width))
        | "sizes" >> beam.CombineGlobally(_Sizes())
    )
    _ = (
        pipeline
        | "once" >> beam.Create([None])
        | "summary"
        >> beam.Map(
            tasks.write_summary,
            images=beam.pvalue.AsSingleton(image_numbers),
            captions=beam.pvalue.AsSingleton(captions),
            reasons=beam.pvalue.AsDict(reasons),
            examples=beam.pvalue.AsDict(examples),
            sizes=beam.pvalue.AsSingleton(sizes),
            blocks=beam.pvalue.AsSingleton(blocks),
        )
    )


def _parts(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Parts of a shard of the source, large enough that opening it for each costs little."""
    for first in range(start, stop, PART):
        yield first, min(first + PART, stop)


def _lines_of_item(index: int, item: Checked) -> list[Line]:
    return [((index, OF_ITEM, i), line) for i, line in enumerate(kept.item_lines(item))]


def _merge(_: str, items: Iterable[tuple[int, Checked]]) -> Iterator[Any]:
    """The first of several items with the same pixels, and the captions of those of its split."""
    first_index, first = min(items, key=lambda indexed: indexed[0])
    yield first_index, dataclasses.replace(first, captions=[], removed=[])
    for index, item in items:
        if index != first_index:
            line = kept.merged_line(item, first.split, first.id)
            yield beam.pvalue.TaggedOutput(LINES, ((index, MERGED, 0), line))
        if item.split == first.split:
            for place, text in enumerate(item.captions):
                yield beam.pvalue.TaggedOutput(
                    USES, Occurrence(index, place, first_index, item.id, text)
                )


def _repeat(_: bytes, uses: Iterable[Occurrence]) -> Iterator[Any]:
    """The first use of a caption."""
    first = min(uses, key=_position)
    yield first
    for use in uses:
        if _position(use) != _position(first):
            line = kept.repeated_line(use.id, first.id, use.text)
            yield beam.pvalue.TaggedOutput(LINES, ((use.index, REPEATED, use.place), line))


def _position(use: Occurrence) -> tuple[int, int]:
    return use.index, use.place


def _count(elements: Any, name: str, key: Callable[[Any], tuple[str, int]]) -> Any:
    """The Numbers of elements. key: element -> (split, block)."""
    return (
        elements
        | f"{name}: keys" >> beam.Map(key)
        | f"{name}: count" >> beam.combiners.Count.PerElement()
        | f"{name}: collect" >> beam.combiners.ToDict()
        | f"{name}: add up" >> beam.Map(_numbers)
    )


def _numbers(counts: Mapping[tuple[str, int], int]) -> Numbers:
    begins, totals = {}, Counter[str]()
    for split, block in sorted(counts):
        begins[split, block] = totals[split]
        totals[split] += counts[split, block]
    return Numbers(begins, dict(totals))


def _number_captions(
    grouped: tuple[int, Iterable[Occurrence]], numbers: Numbers
) -> Iterator[tuple[int, Occurrence]]:
    """(number, first use) of the captions of a block."""
    block, firsts = grouped
    return enumerate(sorted(firsts, key=_position), numbers.begins[ALL, block])


def _refer(
    joined: tuple[bytes, tuple[Iterable[tuple[int, int, int]], Iterable[int]]], block: int
) -> Iterator[tuple[int, tuple[int, int, int, int]]]:
    _, (uses, (number,)) = joined
    for index, place, image in uses:
        yield image // block, (image, index, place, number)


def _number_images(
    grouped: tuple[int, tuple[Iterable[tuple[int, Checked]], Iterable[tuple[int, int, int, int]]]],
    size: int,
    numbers: Numbers,
) -> Iterator[tuple[tuple[str, int], tuple[int, KeptImage]]]:
    """((split, shard), (number in the split, image)) of the images of a block.

    grouped: (block, ((index, item) of each image, references)).
    """
    block, (images, references) = grouped
    captions = {
        image: list(dict.fromkeys(number for *_, number in group))
        for image, group in itertools.groupby(sorted(references), key=lambda use: use[0])
    }
    following = {split: numbers.begins.get((split, block), 0) for split in SPLITS}
    for index, item in sorted(images, key=lambda indexed: indexed[0]):
        number = following[item.split]
        following[item.split] += 1
        image = KeptImage(
            index, item.id, item.height, item.width, item.content, captions.get(index, [])
        )
        yield (item.split, number // size), (number, image)


class _Sizes(beam.CombineFn):
    """Smallest and largest side, and mean height and width, of images (height, width)."""

    def create_accumulator(self):
        return 0, float("inf"), 0, 0, 0

    def add_input(self, total, sides):
        count, low, high, height, width = total
        return (
            count + 1,
            min(low, *sides),
            max(high, *sides),
            height + sides[0],
            width + sides[1],
        )

    def merge_accumulators(self, totals):
        counts, lows, highs, heights, widths = zip(*totals)
        return sum(counts), min(lows), max(highs), sum(heights), sum(widths)

    def extract_output(self, total):
        return kept.sizes(*total) if total[0] else {}
