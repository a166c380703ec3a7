"""Conversations with images: the forms that people have, and one line for every bad row."""

import json

import pytest
from PIL import Image

from finetune.data import image_rows, rows
from finetune.data.image_files import open_image, to_rgb
from finetune.errors import UserError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for i, name in enumerate("abc"):
        Image.new("RGB", (4 + i, 3), (i, 0, 0)).save(tmp_path / f"pictures/{name}.png")
    return tmp_path


def asked(text, answer="seven", **more):
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}], **more}


def write(folder, *found, name="rows.jsonl"):
    (folder / name).write_text("\n".join(json.dumps(row) for row in found) + "\n")
    return folder / name


A, B = "pictures/a.png", "pictures/b.png"
IMAGE = {"type": "image"}


def text(said):
    return {"type": "text", "text": said}


def test_llavas_file_and_ours_are_read_alike(folder):
    said = [{"from": "human", "value": "<image>\nWhich digit?"}, {"from": "gpt", "value": "seven"}]
    llava = {"id": "0", "image": A, "conversations": said}
    (folder / "llava.json").write_text(json.dumps([llava]))
    ours = write(folder, asked("<image>\nWhich digit?", images=[A]))
    one, two = image_rows.read(folder / "llava.json"), image_rows.read(ours)
    assert one[0].messages == two[0].messages
    assert one[0].messages == [
        {"role": "user", "content": [IMAGE, text("\nWhich digit?")]},
        {"role": "assistant", "content": [text("seven")]},
    ]
    assert one[0].images == two[0].images == (folder / A,)
    assert one[0].place == f"{folder / 'llava.json'}, row 1"
    assert two[0].place == f"{ours}, line 1"
    assert [image.size for image in two[0].open()] == [(4, 3)]


def test_several_images_keep_their_order_and_rows_without_any_are_read(folder):
    file = write(folder, asked("first <image>, then <image>?", images=[B, A]), asked("no image"))
    found = image_rows.read(file)
    assert found[0].messages[0]["content"] == [text("first "), IMAGE, text(", then "), IMAGE, text("?")]
    assert [image.size for image in found[0].open()] == [(5, 3), (4, 3)]
    assert found[1].images == ()
    assert found[1].messages[0]["content"] == [text("no image")]


def test_other_forms_have_images_too(folder):
    file = write(
        folder,
        {"prompt": "<image>which?", "completion": "one", "image": A},
        {"instruction": "Describe.", "input": "<image>", "output": "one", "image": A},
        {"prompt": [{"role": "user", "content": "<image>?"}], "completion": [{"role": "assistant", "content": "x"}],
         "image": [A]},
        {"system": "Be brief.", **asked("<image>?", image=A)},
    )  # fmt: skip
    found = image_rows.read(file)
    assert [row.images for row in found] == [(folder / A,)] * 4
    assert [sum(part == IMAGE for m in row.messages for part in m["content"]) for row in found] == [1] * 4


def test_parts_with_paths_and_a_typed_placeholder(folder):
    file = write(
        folder,
        asked([{"type": "image", "image": B}, text("What does <image> mean?")], [text("The word <image>.")]),
        asked([text("one"), IMAGE, text("two"), IMAGE], images=[A, B]),
    )
    found = image_rows.read(file)
    assert found[0].messages[0]["content"] == [IMAGE, text("What does <image> mean?")]
    assert found[0].messages[1]["content"] == [text("The word <image>.")]
    assert found[0].images == (folder / B,)
    assert found[1].messages[0]["content"] == [text("one"), IMAGE, text("two"), IMAGE]
    assert found[1].images == (folder / A, folder / B)


def test_absolute_paths_compressed_files_and_folders(folder, tmp_path_factory):
    import gzip

    other = tmp_path_factory.mktemp("elsewhere")
    packed = gzip.compress(json.dumps(asked("<image>", image=str(folder / A))).encode())
    (other / "a.jsonl.gz").write_bytes(packed)
    write(other, asked("hello"), name="b.jsonl")
    assert [row.images for row in image_rows.read(other)] == [(folder / A,), ()]


def half(path):
    path.write_bytes(path.read_bytes()[:45])


def animated(path):
    frames = [Image.new("RGB", (8, 8), (value,) * 3) for value in (0, 255)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


BAD = [
    (asked("<image>", image="pictures/none.png"), "pictures/none.png: there is no such file"),
    (asked("<image>", image="pictures"), "pictures is a folder"),
    (asked("<image>", image="half.png"), "half.png is not a readable image"),
    (asked("<image>", image="text.png"), "text.png is not a readable image"),
    (asked("<image>", image="moves.png"), "animation of 2 frames"),
    (asked("<image>"), "the <image> of message 0 has no image: the row has 0"),
    (asked("<image> <image>", image=A), "the <image> of message 0 has no image: the row has 1"),
    (asked("hello", image=A), "the image 'pictures/a.png' has no <image>: the messages have 0"),
    (asked("<image>", images=[A, B]), "the image 'pictures/b.png' has no <image>: the messages have 1"),
    (asked("hello", "<image>", image=A), "message 1 (assistant) has an <image>"),
    (asked("<image>", image=A, images=[A]), "the row has 'image' and 'images'"),
    (asked("<image>", image={"bytes": "x"}), "'image' must be a path or a list of paths, not an object"),
    (asked("<image>", images=[3]), "'images' must hold paths of image files, not a number"),
    (asked("<image>", images=[""]), "not an empty text"),
    (asked("<image>", image="https://example.org/a.png"), "images are read from files"),
    (asked("<image>", image="data:image/png;base64,AAAA"), "images are read from files"),
    (asked([{"type": "video"}]), "part of type 'video'"),
    (asked([{"type": "image_url", "image_url": {"url": "x"}}]), "part of type 'image_url'"),
    (asked([{"type": "text"}]), "text part of message 0 has no 'text'"),
    (asked([{"type": "image", "image": A}], image=B), "keep one of them"),
    (asked([{"type": "image", "image": A}, IMAGE]), "has no image: the row has 1"),
    (asked("\ufdd0<image>", image=A), "U+FDD0"),
    ([1], "a row must be a JSON object, not a list"),
    ({"messages": "hello", "image": A}, "not JSON"),
    ({"text": "hello"}, "keys of no known form"),
]


@pytest.mark.parametrize(("row", "says"), BAD, ids=[says for _, says in BAD])
def test_a_bad_row_is_one_line_with_its_file_and_line(folder, row, says):
    half_file = folder / "half.png"
    Image.effect_noise((64, 64), 50).save(half_file)
    half(half_file)
    (folder / "text.png").write_text("hello")
    animated(folder / "moves.png")
    file = write(folder, asked("fine"), row)
    with pytest.raises(UserError) as caught:
        image_rows.read(file)
    assert str(caught.value).startswith(f"{file}, line 2: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_image_that_breaks_after_reading_names_its_row(folder):
    row = image_rows.read(write(folder, asked("hello"), asked("<image>", image=A)))[1]
    half(folder / A)
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2: .*a\.png is not a readable image"):
        row.open()


def test_an_empty_file_and_other_kinds_are_refused(folder):
    (folder / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no rows"):
        image_rows.read(folder / "empty.jsonl")
    (folder / "rows.csv").write_text("prompt,completion\na,b\n")
    with pytest.raises(UserError, match=r"are read from \.jsonl"):
        image_rows.read(folder / "rows.csv")


@pytest.mark.parametrize("key", ["image", "images"])
def test_rows_of_text_alone_refuse_images(folder, key):
    """A trainer of text would learn to answer without seeing."""
    file = write(folder, asked("<image>?", **{key: A}))
    with pytest.raises(UserError, match=f"'{key}' is not supported"):
        rows.read(file)


def test_photos_are_upright_and_transparency_is_white(tmp_path):
    turned, exif = Image.new("RGB", (6, 4)), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90°
    turned.save(tmp_path / "photo.jpg", exif=exif)
    assert open_image(tmp_path / "photo.jpg").size == (4, 6)
    Image.new("RGBA", (2, 2), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    assert to_rgb(open_image(tmp_path / "clear.png")).getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(UserError, match=r"photo\.jpg is 6×4: at most 5 a side, or scale it"):
        open_image(tmp_path / "photo.jpg", 5, ", or scale it")
