"""Sources as people have them: downloaded in part, unpacked on another system, full of links, in other encodings."""

import json
import os
from pathlib import Path

import pytest
from builds import Turned, build, celeba, coco, commoncanvas, journeydb, own_file, own_folder, samples_of, styles
from ipadapter_instruct_core.tasks import Task
from sources import make_own, photograph, save, variants
from training.datasets.sample import decode_picture
from training.datasets.sources.files import pictures_in, texts_in
from training.datasets.sources.folders import LeftOut, LeftOutCount
from training.datasets.sources.own import Own


def test_journeydb_in_part_is_built_of_the_folders_that_are_there(tmp_path, monkeypatch, caplog):
    """One of its two numbered folders: half of the lines name pictures that were not downloaded."""
    source = journeydb(tmp_path / "source", count=24)
    for picture in (tmp_path / "source" / "imgs" / "001").iterdir():
        picture.unlink()
    looked, real = [], os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder=".": looked.append(str(folder)) or real(folder))
    manifest = build(source, tmp_path / "out")
    assert manifest["counts"] == {"validation": 1, "train": 11} and manifest["skipped"] == []
    (left,) = manifest["left_out"]
    assert left["count"] == 12 and len(left["names"]) == 12 and all(name.startswith("./001/") for name in left["names"])
    assert f"12 left out, since there is no such picture in {source['images']} (./001/cat-0.jpg, " in caplog.text
    assert sorted(looked) == [str(source["images"] / "000"), str(source["images"] / "001")], "one look into each folder"
    ids = {sample.source_id for split in ("train", "validation") for sample in samples_of(tmp_path / "out", split)}
    assert len(ids) == 12 and all(name.startswith("./000/") for name in ids)
    (tmp_path / "source" / "imgs" / "001").rmdir()
    assert build(source, tmp_path / "again")["counts"] == manifest["counts"], "the folder itself may be missing"


@pytest.mark.parametrize("make", [celeba, coco, own_file], ids=lambda make: make.__name__)
def test_what_was_not_downloaded_is_no_damage(tmp_path, make):
    source = make(tmp_path / "source")
    pictures = sorted((tmp_path / "source").rglob("*.jpg"))
    pictures = [path for path in pictures if "wild" not in path.name and path.parent.name != "img_celeba"]
    gone = pictures[::2]
    for path in gone:
        path.unlink()
    manifest = build(source, tmp_path / "out", max_skipped=0)
    assert manifest["skipped"] == [] and sum(manifest["counts"].values()) > 0
    reasons = {left["why"]: left for left in manifest["left_out"]}
    folder = source["data"].parent if make is own_file else source["images"]
    assert reasons[f"there is no such picture in {folder}"]["count"] >= len(gone) / 2
    if make is celeba:  # pairs are made of the pictures that are there
        there = {path.name for path in pictures} - {path.name for path in gone}
        pairs = {
            name
            for split in ("train", "validation")
            for sample in samples_of(tmp_path / "out", split)
            for name in sample.source_id.split(">")
        }
        assert pairs == there


def test_where_nothing_was_downloaded_the_reason_is_told(tmp_path):
    source = journeydb(tmp_path / "source", count=6)
    source["images"] = tmp_path / "elsewhere"
    with pytest.raises(
        ValueError,
        match=r"holds no samples; check .* right ones: 6 left out, since there is no such picture in .*elsewhere",
    ):
        build(source, tmp_path / "out")


def test_a_damaged_picture_that_is_there_is_still_damage(tmp_path):
    source = journeydb(tmp_path / "source", count=24)
    sorted((tmp_path / "source").rglob("*.jpg"))[0].write_bytes(b"")
    with pytest.raises(ValueError, match="1 of 24 items could not be used"):
        build(source, tmp_path / "out", max_skipped=0)


def test_what_systems_leave_behind_is_not_there(tmp_path):
    source = own_folder(tmp_path / "source")
    folder = tmp_path / "source"
    for name in ("part0/._astronaut-0.jpg", "__MACOSX/part0/._cat-0.jpg", ".cache/a.jpg", "Thumbs.db", ".DS_Store"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\x00\x05\x16\x07")
    (folder / "__MACOSX" / "._readme.txt").write_bytes(b"\xff")
    manifest = build(source, tmp_path / "out", max_skipped=0)
    assert sum(manifest["counts"].values()) == 10 and manifest["left_out"] == []


def test_files_of_other_kinds_are_counted_by_their_ending(tmp_path):
    for number, ending in enumerate(["jpg", "JPEG", "jfif", "png"] + ["tif"] * 9 + ["HEIC"] * 2):
        (tmp_path / f"{number}.{ending}").write_bytes(b"x")
        (tmp_path / f"{number}.txt").write_text("a cat")
    (tmp_path / "notes").write_text("x")
    left_out = LeftOutCount()
    names = [name for name, _, _ in left_out.taken_from(pictures_in(tmp_path))]
    assert names == ["0.jpg", "1.JPEG", "2.jfif", "3.png"]
    told = str(left_out)
    assert "9 left out, since files that end in .tif are not read, but those in .jfif, .jpe, .jpeg, .jpg" in told
    assert (
        "2 left out, since files that end in .heic are not read" in told and "1 left out, since files without" in told
    )


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_captions_in_the_encodings_of_windows(tmp_path, encoding):
    save(tmp_path / "a.jpg", photograph("cat"))
    (tmp_path / "a.TXT").write_text("eine Bö\r\n", encoding=encoding)
    ((_, _, caption),) = pictures_in(tmp_path)
    assert caption == "eine Bö"


def test_a_caption_in_an_unknown_encoding_costs_one_sample(tmp_path):
    source = own_folder(tmp_path / "source")
    (tmp_path / "source" / "part0" / "astronaut-0.txt").write_bytes("ein Mädchen".encode("latin-1"))
    manifest = build(source, tmp_path / "out", max_skipped=0)
    assert sum(manifest["counts"].values()) == 9
    (left,) = manifest["left_out"]
    assert left["names"] == ["part0/astronaut-0.jpg"] and "no text in UTF-8 or UTF-16" in left["why"]


def test_linked_folders_and_pictures_are_followed(tmp_path):
    make_own(tmp_path / "disk")
    made = tmp_path / "made"
    made.mkdir()
    (made / "pictures").symlink_to(tmp_path / "disk" / "files")
    (made / "one.jpg").symlink_to(tmp_path / "disk" / "files" / "cat-0.jpg")
    (made / "back").symlink_to(made)
    named = [name for name, _, _ in pictures_in(made)]
    assert len(named) == len(set(named)) == 1 + len(list((tmp_path / "disk" / "files").iterdir()))
    lines = [{"condition": name, "prompt": "a", "task": "style"} for name in ("one.jpg", r"pictures\cat-0.jpg")]
    (made / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    read = [item.condition.read() for item in Own(data=made / "own.jsonl").plan(0)]
    assert read == [(tmp_path / "disk" / "files" / "cat-0.jpg").read_bytes()] * 2


def test_a_file_in_the_folder_where_one_stands(tmp_path, monkeypatch):
    make_own(tmp_path)
    whole = len(list(Own(data=tmp_path / "samples.jsonl").plan(0)))
    monkeypatch.chdir(tmp_path)
    items = list(Own(data=Path("samples.jsonl")).plan(0))
    assert len(items) == whole and all(item.condition.read() for item in items)
    save(tmp_path / "a.jpg", photograph("cat"))
    (tmp_path / "own.jsonl").write_text(json.dumps({"condition": "a.jpg", "prompt": "a", "task": "style"}))
    (item,) = Own(data=Path("own.jsonl")).plan(0)
    assert item.condition.read() == (tmp_path / "a.jpg").read_bytes()


def test_line_separators_within_a_prompt_do_not_cut_it(tmp_path):
    prompts = [f"a cat{sign}on a mat" for sign in ("\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", " ")]
    (tmp_path / "art.txt").write_text("\r\n".join(prompts), encoding="utf-8", newline="")
    assert texts_in(tmp_path / "art.txt") == prompts
    save(tmp_path / "a.jpg", variants(1)[0][2])
    lines = [{"condition": "a.jpg", "prompt": prompt, "task": "style"} for prompt in prompts]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    for encoding in ("utf-8", "utf-16"):
        (tmp_path / "own.jsonl").write_text(text, encoding=encoding)
        assert [item.prompt for item in Own(data=Path(tmp_path / "own.jsonl")).plan(0)] == prompts


def test_a_folder_that_cannot_be_looked_into_is_told(tmp_path, monkeypatch):
    source = own_folder(tmp_path / "source")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", "part0")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match="part0 cannot be looked into .Permission denied.; see to its permissions"):
        list(Own(data=source["data"], task=Task.STYLE).plan(0))


@pytest.mark.parametrize("make", [journeydb, coco, commoncanvas, styles, own_file], ids=lambda make: make.__name__)
def test_small_pictures_are_left_out_counted_and_named(tmp_path, make, capsys):
    source = make(tmp_path / "source")
    whole = build(source, tmp_path / "whole", Turned(), validation=0, size=0, smallest_side=0)
    sides = {}
    for sample in samples_of(tmp_path / "whole", "train"):
        read = [sample.condition] if make is not coco else []  # of which the cut-out may be small
        read += [sample.target] if sample.target and make not in (commoncanvas, styles) else []
        sides[sample.source_id] = min(min(decode_picture(content).size) for content in read)
    limit = sorted(sides.values())[len(sides) // 2]
    small = {name for name, side in sides.items() if side < limit}
    manifest = build(source, tmp_path / "out", Turned(), validation=0, size=0, smallest_side=limit, max_skipped=0)
    assert manifest["skipped"] == [] and small and sum(manifest["counts"].values()) == len(sides) - len(small)
    (left,) = manifest["left_out"]
    assert set(left["names"]) == small and left["count"] == len(small) and f"under {limit} pixels" in left["why"]
    assert f"{len(small)} left out, since a short side is under {limit} pixels" in capsys.readouterr().out
    assert whole["left_out"] == []


def test_pairs_with_a_small_face_are_left_out(tmp_path):
    """Aligned faces have 178 by 218 pixels; the picture's size counts, not that of the face cut out of it."""
    source = celeba(tmp_path / "source")
    save(source["images"] / "000005.jpg", photograph("cat").resize((100, 177)))
    for limit, small in ((100, []), (101, ["000005.jpg"]), (178, ["000005.jpg"])):
        manifest = build(source, tmp_path / f"{limit}", validation=0, smallest_side=limit)
        assert len(manifest["left_out"]) == len(small)
        for left in manifest["left_out"]:
            assert left["count"] == 2 and all("000005.jpg" in name for name in left["names"])


def test_left_out_is_told_with_three_names():
    count = LeftOutCount()
    assert str(count) == "" and list(count.taken_from([1, LeftOut("a", "it is small"), 2])) == [1, 2]
    for number in range(2000):
        count.add(LeftOut(f"{number}", "it is not there"))
    assert str(count) == "2,000 left out, since it is not there (0, 1, 2, …); 1 left out, since it is small (a)"
    assert [len(left["names"]) for left in count.listed()] == [100, 1]
