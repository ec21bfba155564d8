"""Folders and data sets of photographs: which files count, and what their captions are."""

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.dataset.lock import Lock, Segment, create_lock
from rayjobs.dataset.manifest import Manifest
from rayjobs.dreambooth.data.photos import find_photos, look_for_photos, tell_skipped

SKS = "a photo of sks dog"


def encode(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def wide(picture: Callable[[int], Image.Image], number: int = 0) -> Image.Image:
    return picture(number).crop((0, 0, 60, 40))


def test_a_photo_knows_its_bytes(picture: Callable[[int], Image.Image], tmp_path: Path) -> None:
    data = encode(wide(picture))
    (tmp_path / "b.png").write_bytes(data)
    picture(1).save(tmp_path / "a.png")
    first, second = find_photos(str(tmp_path), SKS)
    assert (first.name, second.name) == ("a.png", "b.png")
    assert second.sha256 == hashlib.sha256(data).hexdigest()
    assert second.read() == data
    assert second.open().tobytes() == wide(picture).tobytes()


def test_captions_lie_beside_pictures(
    picture: Callable[[int], Image.Image], tmp_path: Path
) -> None:
    (tmp_path / "inner").mkdir()
    for name in ("cat.png", "dog.jpg", "owl.png", "inner/dog.png"):
        picture(0).save(tmp_path / name)
    (tmp_path / "dog.txt").write_text("a sks dog\n  on a   beach\n\n")
    (tmp_path / "owl.txt").write_bytes("\ufeffun été\r\n".encode())
    photos = find_photos(str(tmp_path), SKS)
    assert {photo.name: photo.captions for photo in photos} == {
        "cat.png": (SKS,),
        "dog.jpg": ("a sks dog", "on a beach"),
        "owl.png": ("un été",),
        "inner/dog.png": (SKS,),
    }


@pytest.mark.parametrize("key", ["text", "caption", "prompt"])
def test_captions_of_metadata(
    key: str, picture: Callable[[int], Image.Image], tmp_path: Path
) -> None:
    (tmp_path / "inner").mkdir()
    for name in ("a.png", "b.png", "inner/a.png", "inner/c.png"):
        picture(0).save(tmp_path / name)
    rows = [{"file_name": "a.png", key: "one\u2028line"}, {"file_name": "inner/c.png", key: "c"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "metadata.jsonl").write_bytes("\r\n".join(["\ufeff" + lines[0], lines[1]]).encode())
    inner = json.dumps({"file_name": "a.png", key: "inner a"})
    (tmp_path / "inner" / "metadata.jsonl").write_text(inner + "\n")
    photos = find_photos(str(tmp_path), SKS)
    assert {photo.name: photo.captions for photo in photos} == {
        "a.png": ("one\u2028line",),
        "b.png": (SKS,),
        "inner/a.png": ("inner a",),
        "inner/c.png": ("c",),
    }


def test_captions_of_other_trainers(picture: Callable[[int], Image.Image], tmp_path: Path) -> None:
    """kohya's .caption, names with both suffixes, a csv, lists, names as a shell writes them."""
    for name in ("a.jfif", "b.png", "c.png", "d.png", "e.png", "f.png", "g.png", "ge\u0301.png"):
        picture(0).save(tmp_path / name, "JPEG" if name.endswith("jfif") else "PNG")
    (tmp_path / "a.caption").write_text("one")
    (tmp_path / "b.png.txt").write_text("two")
    (tmp_path / "metadata.csv").write_bytes(b'\xef\xbb\xbffile_name,text\r\nc.png,"three, 3"\r\n')
    rows = [
        {"file_name": "./d.png", "text": ["four", "4"]},
        {"file_name": "e.png", "text": None, "caption": "five"},
        {"file_name": "f.png", "text": None},
        {"file_name": "g.png", "text": "six"},
        {"file_name": "g.png", "text": "6"},
    ]
    (tmp_path / "g\u00e9.txt").write_text("un\u2028\u00e9t\u00e9")
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = look_for_photos(str(tmp_path), SKS)
    assert {photo.name: photo.captions for photo in found.photos} == {
        "a.jfif": ("one",),
        "b.png": ("two",),
        "c.png": ("three, 3",),
        "d.png": ("four", "4"),
        "e.png": ("five",),
        "f.png": (SKS,),
        "g.png": ("six", "6"),
        "ge\u0301.png": ("un \u00e9t\u00e9",),
    }
    assert found.skipped == {}


def test_pictures_and_masks_of_one_name(
    picture: Callable[[int], Image.Image], tmp_path: Path
) -> None:
    """What belongs to a name belongs to each picture of it; only a name of masks makes one."""
    for number, name in enumerate(("a.jpg", "a.png", "a-mask.png", "b.png", "masks/b.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(number).save(tmp_path / name)
    (tmp_path / "a.txt").write_text("both")
    found = look_for_photos(str(tmp_path), SKS)
    assert {photo.name: (*photo.captions, photo.mask) for photo in found.photos} == {
        "a.jpg": ("both", "a-mask.png"),
        "a.png": ("both", "a-mask.png"),
        "b.png": (SKS, "masks/b.png"),
    }


def test_what_is_passed_over_is_told(picture: Callable[[int], Image.Image], tmp_path: Path) -> None:
    for name in ("dog.png", "dog-masklabel.png", "owl.png", "a-mask.png", "9_sks dog/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(0).save(tmp_path / name)
    (tmp_path / "dog.txt").write_text("a sks dog")
    (tmp_path / "dog.caption").write_text("another")
    (tmp_path / "readme.txt").touch()
    (tmp_path / "Owl.txt").write_bytes(b"\xe9t\xe9")
    (tmp_path / "notes.md").touch()
    (tmp_path / ".DS_Store").touch()
    (tmp_path / "gone.png").symlink_to(tmp_path / "absent.png")
    cells = {"dog.png": "text", "cat.png": "text", "owl.png": "description"}
    rows = [json.dumps({"file_name": name, column: "x"}) for name, column in cells.items()]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    found = look_for_photos(str(tmp_path), SKS)
    # A mask is one only beside its picture.
    names = [photo.name for photo in found.photos]
    assert names == ["9_sks dog/x.png", "a-mask.png", "dog.png", "owl.png"]
    assert found.photos[2].captions == ("a sks dog",)
    assert found.skipped == {
        "dog.caption": "its picture has another caption",
        "Owl.txt": "a caption of no picture",
        "readme.txt": "a caption of no picture",
        "metadata.jsonl: dog.png": "its picture has another caption",
        "metadata.jsonl: cat.png": "no such picture",
        "metadata.jsonl: owl.png": "a row without text, caption, prompt",
        "9_sks dog/": "repeats and words in a folder's name are not read; use repeats and prompt",
        "notes.md": "neither a picture nor a caption",
        "dog-masklabel.png": "a mask; train.masks=files uses it",
        "gone.png": "a broken link",
    }
    told = tell_skipped(found.skipped)
    assert "passed over, a caption of no picture: Owl.txt, readme.txt" in told
    many = tell_skipped({f"{number}.md": "no picture" for number in range(9)})
    assert many == ["passed over, no picture: 0.md, 1.md, 2.md, 3.md, 4.md and 4 more"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name,text\na.png,x\n", "its columns are name, text, not file_name and text"),
        ('file_name,text\na.png,"x\n', "no file_name and text"),
        ("file_name,text\na.png,a sks dog, red\n", "line 2: more cells than columns"),
    ],
)
def test_a_table_that_cannot_be_read(
    text: str, told: str, picture: Callable[[int], Image.Image], tmp_path: Path
) -> None:
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(BadInput, match=told):
        find_photos(str(tmp_path), SKS)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1]",
        '"a"',
        '{"text": "x"}',
        '{"file_name": "a.png", "text": " "}',
        '{"file_name": "a.png", "text": []}',
        '{"file_name": "a.png", "text": ["x", 1]}',
        '{"file_name": "a.png", "text": {"en": "x"}}',
    ],
)
def test_a_bad_line_of_metadata_is_told_by_number(
    line: str, picture: Callable[[int], Image.Image], tmp_path: Path
) -> None:
    picture(0).save(tmp_path / "a.png")
    good = '{"file_name": "a.png", "text": "x"}'
    (tmp_path / "metadata.jsonl").write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(BadInput, match=r"^metadata\.jsonl, line 2: not JSON with"):
        find_photos(str(tmp_path), SKS)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b" \n", "empty"),
        (b"\xe9t\xe9", "not UTF-8"),
        ("a dog".encode("utf-16-le"), "not UTF-8"),
    ],
)
def test_an_unusable_caption_is_refused(
    data: bytes, told: str, picture: Callable[[int], Image.Image], tmp_path: Path
) -> None:
    picture(0).save(tmp_path / "dog.png")
    (tmp_path / "dog.txt").write_bytes(data)
    with pytest.raises(BadInput, match=rf"^dog\.txt: {told}"):
        find_photos(str(tmp_path), SKS)


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("none here")
    with pytest.raises(BadInput, match="no pictures in it"):
        find_photos(str(tmp_path), SKS)
    with pytest.raises(BadInput, match="no such folder of pictures"):
        find_photos(str(tmp_path / "none"), SKS)


def begin_data_set(uri: str, output_format: str = "parquet") -> Manifest:
    """A data set whose shards are still to be made."""
    segment = Segment(
        job={"output": {"format": output_format}},
        prompts_sha256="",
        num_prompts=2,
        model_name="starter",
        model_sha256="",
        guided=True,
        num_records=2,
        num_shards=2,
    )
    assert create_lock(Lock(segments=(segment,), determinism={}), uri)
    return Manifest(uri, output_format)


def shard(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=2)
    return buffer.getvalue()


def test_shards_of_another_format_are_refused(tmp_path: Path) -> None:
    begin_data_set(str(tmp_path), "webdataset")
    with pytest.raises(BadInput, match="no parquet shards"):
        find_photos(str(tmp_path), SKS)


def test_a_changed_photo_is_refused(picture: Callable[[int], Image.Image], tmp_path: Path) -> None:
    picture(0).save(tmp_path / "dog.png")
    (photo,) = find_photos(str(tmp_path), SKS)
    picture(1).save(tmp_path / "dog.png")
    with pytest.raises(BadInput, match=r"^dog\.png: changed while the run uses it"):
        photo.open()


def test_the_good_records_of_committed_shards_are_photos(
    picture: Callable[[int], Image.Image], tmp_path: Path
) -> None:
    images = [encode(picture(number)) for number in range(6)]
    rows = [
        {
            "record": 10 + number,
            "prompt": f"dog {number}",
            "status": "failed" if number == 1 else "ok",
            "image": {"bytes": data, "path": None},
            "image_sha256": hashlib.sha256(data).hexdigest(),
            "width": 64,
            "height": 64,
        }
        for number, data in enumerate(images)
    ]
    rows[3] |= {"prompt": "(dog:1.2) 3", "prompt_syntax": "a1111"}  # its words are its caption
    rows = [{"prompt_syntax": None} | row for row in rows]
    manifest = begin_data_set(str(tmp_path))
    with pytest.raises(BadInput, match="its manifest names no finished shard"):
        find_photos(str(tmp_path), SKS)
    manifest.commit(0, {"shard-00000000.parquet": shard(rows)}, {"rows": 6, "failed": 1})
    # What a worker left that died before it could commit.
    stray = tmp_path / "data" / "shard-00000001.parquet"
    stray.write_bytes(shard([row | {"record": 20 + row["record"]} for row in rows]))
    photos = find_photos(str(tmp_path), SKS)
    assert [photo.captions for photo in photos] == [(f"dog {n}",) for n in (0, 2, 3, 4, 5)]
    assert photos[-1].name == "shard-00000000.parquet, record 15"
    for photo in photos:
        assert hashlib.sha256(photo.read()).hexdigest() == photo.sha256
    assert photos[2].open().tobytes() == picture(3).tobytes()


def test_pictures_of_a_bucket(
    bucket: str,
    picture: Callable[[int], Image.Image],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAYJOBS_CACHE", str(tmp_path / "cache"))
    uri = f"{bucket}/dogs"
    with pytest.raises(BadInput, match="no such folder of pictures"):
        find_photos(uri, SKS)
    data = encode(wide(picture))
    storage.write_bytes(f"{uri}/a.png", data)
    storage.write_bytes(f"{uri}/inner/b.png", encode(picture(1)))
    storage.write_bytes(f"{uri}/inner/b.txt", b"a sks dog, asleep")
    storage.write_bytes(f"{uri}/.DS_Store", b"stray")
    first, second = find_photos(uri, SKS)
    assert (first.name, first.captions) == ("a.png", (SKS,))
    assert (second.name, second.captions) == ("inner/b.png", ("a sks dog, asleep",))
    assert first.sha256 == hashlib.sha256(data).hexdigest()
    assert second.open().tobytes() == picture(1).tobytes()
