"""The gallery: its files, what it refuses, and how it behaves in a browser."""

import base64
import io
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
import weakref
from html.parser import HTMLParser
from urllib.parse import quote

import numpy as np
import pytest
import torch
from PIL import Image

from deconvnet.visualization.drawing.tile_sheet import to_sheet
from deconvnet.visualization.gallery import photographs, sprites
from deconvnet.visualization.gallery.exhibits import (
    Control,
    Example,
    Figure,
    GalleryImage,
    GalleryLayer,
    GalleryMap,
    Histogram,
    ImageLayer,
    Part,
    ProjectionSheet,
    Repainting,
    Source,
)
from deconvnet.visualization.gallery.gallery import write_gallery
from deconvnet.visualization.gallery.page_text import CONCEPT_WORDS, IMAGES, RECORDINGS
from deconvnet.visualization.gallery.photographs import Photographs
from deconvnet.visualization.search.heat import Heat
from deconvnet.visualization.search.tile_codec import webp

# Names that nobody should have, and everybody has.
HOSTILE = """</script><img src=x onerror="alert(1)">'&amp;<b>"""
LAYERS = ("features.8#1", "../..", HOSTILE)
VOID = {"meta", "link", "img", "input", "br", "rect", "path", "image"}


def tone(number, *, size=8):
    """A tile of one colour, another one for every number up to 511."""
    levels = torch.tensor([number // 64, number // 8 % 8, number % 8]) / 7
    return (0.1 + 0.8 * levels)[:, None, None].expand(3, size, size)


def tones(start, count=3, **options):
    return torch.stack([tone(start + n, **options) for n in range(count)])


def some_map(number, *, start=0, size=8, **options):
    window = {"box": (0, 4, 12, 16), "window": (-4, 4, 12, 16)}
    given = {
        "examples": [
            Example("a.png", 3.5, 2, (1, 5), border=True, **window),
            Example(HOSTILE, -2.0, 0),
            Example("b", 0.25),
        ],
        "statistics": {"strongest": float(number % 5), HOSTILE: HOSTILE},
        "similar": [((number + 1) % 12, 0.75)],
        "coactive": [((number + 2) % 12, 0.5)],
        "histogram": Histogram([3, 0, 1], [0, 1, 2, 3], silent=2),
        "spectrum": [Example("c.png", 1.0, 1, share=0.5)],
        "spectrum_patches": tones(start + 200, 1, size=size),
    }
    projections = {
        "deconv": tones(start + number, size=size),
        "guided": tones(start + 300 + number, size=size),
    }
    patches = tones(start + 100 + number, size=size)
    return GalleryMap(number, projections, patches, **{**given, **options})


def some_layers(*, maps=12, sizes=(8, 40, 8), **options):
    for number, (name, size) in enumerate(zip(LAYERS, sizes, strict=True)):
        below = [Source([1], 2.0, tone(440, size=size)), Source([2, 3], 1.0)] if number else []
        made = [some_map(k, start=20 * number, size=size, **options) for k in range(maps)]
        made[3] = GalleryMap(3, statistics={"strongest": float("nan")})
        made[4] = some_map(
            4, start=20 * number, evolution=tones(400, 2), epochs=(1, 20), sources=below
        )
        if number == 0:
            made[5] = some_map(5, filter=tone(5, size=3), label="zebra")
        yield GalleryLayer(
            name,
            f"Layer {number + 1}",
            iter(made),
            kind=HOSTILE,
            shape=(maps, 30 - 5 * number, 20),
            field=(7, 7 + 20 * number),
            stride=(1, 2),
            facts={"density": 0.01},
            control=Control({0: tones(450, 2, size=size), 7: None}),
            below=LAYERS[number - 1] if number else None,
            notes=[HOSTILE],
        )


def some_repainting():
    """An image of 2 x 3 pixels and one plane that two activations paint exactly, and a group that
    adds nothing."""
    image = np.array([[[1.0, 2, 0], [0, -3, 0]]], dtype=np.float32)
    return Repainting(
        image,
        np.zeros((1, 2, 3), np.float32),
        [image[:, :1, :2], image[:, 1:, 1:2]],
        [(0, 0, 1, 2), (1, 1, 2, 2)],
        maps=[1, 99],
        values=[5.0, -4.0],
        rgb=np.ones((3, 1)),
        white=3.0,
        total=10,
        groups=[(3, 8, np.zeros((1, 2, 3), np.float32))],
    )


def some_images(count=2):
    for n in range(count):
        parts = [Part(k, 2.0 - k, tone(k), box=(10, 0, 18, 8)) for k in (1, 2, 99)]
        rebuilt = ImageLayer(
            *(LAYERS[0], tone(80, size=48), {"SNR": "3 dB"}, [(2, tone(2))], parts),
            repainting=some_repainting() if n == 0 else None,
        )
        yield GalleryImage(
            f"{n} {HOSTILE}",
            tone(70 + n, size=48),
            [
                rebuilt,
                ImageLayer(LAYERS[1], None, {}, [(0, tone(0)), (1, tone(1))], parts[:1]),
                ImageLayer(LAYERS[2]),
            ],
            photograph=2 * n,
        )


def some_photographs():
    names = [HOSTILE, "folder/c.png", "folder/a.png", "unused"]
    return Photographs(names, [tone(460 + n, size=40) for n in range(3)])


def write(folder, **options):
    given = {
        "title": f"A network {HOSTILE}",
        "subtitle": HOSTILE,
        "facts": {HOSTILE: HOSTILE, "images": 3},
        "layers": some_layers(),
        "images": some_images(),
        "photographs": some_photographs(),
        "figures": [Figure(tone(500, size=20), HOSTILE)],
        "notes": [HOSTILE],
    }
    return write_gallery(folder, **{**given, **options})


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a gallery with everything in it, in a folder with an awkward name."""
    return write(tmp_path_factory.mktemp("a b#c%20") / "gallery")


class Outline(HTMLParser):
    """The elements of a page, and whether they are nested as they should be."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts = [], [], {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.texts[self.open[-1] if self.open else ""] = text

    def all(self, *tags):
        return [attributes for tag, attributes in self.elements if tag in tags]


def page_data(page):
    """What the page hands to its script."""
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text())[1])


def script_data(page, name):
    """The data that one of the scripts next to the page adds."""
    text = (page.parent / name).read_text()
    file, content = re.fullmatch(r'gallery\.add\("([^"]*)",(.*)\);\n', text, re.DOTALL).groups()
    assert file == name
    return json.loads(content)


def files_named(value):
    """All values of "file", "script" and others that name files in nested data."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key in ("scripts", "pages"):
                yield from filter(None, item)
                continue
            is_file = key in ("file", "script", "json", "repainting")
            yield from [item] if is_file else files_named(item)
    elif isinstance(value, list):
        for item in value:
            yield from files_named(item)


def needed_files(page):
    """Every file that the page names, in its HTML, its data and the scripts that it loads."""
    outline = Outline(page.read_text())
    named = set(
        re.findall(r"url\(([^)]*)\)", " ".join(a.get("style", "") for _, a in outline.elements))
    )
    for attributes in outline.all("script", "img", "link", "image", "a"):
        named.add(attributes.get("src") or attributes.get("href") or "#")
    data = page_data(page)
    named.update(files_named(data))
    scripts = [name for layer in data["layers"] for name in layer["scripts"]]
    for script in (*scripts, *(image["script"] for image in data["images"])):
        named.update(files_named(script_data(page, script)))
    return {name for name in named if not name.startswith(("#", "data:"))} | {page.name}


def tiles_of(page, sheet):
    """The tiles (h, w, 3) of a sheet, cut out of its file; None where one is said to be missing."""
    pixels = np.asarray(Image.open(page.parent / sheet["file"]).convert("RGB"))
    h, w, gap = sheet["height"], sheet["width"], page_data(page)["gap"]
    cells = []
    for n in range(sheet["first"], sheet["first"] + sheet["count"]):
        top, left = n // sheet["columns"] * (h + gap), n % sheet["columns"] * (w + gap)
        cells.append(pixels[top : top + h, left : left + w])
        assert cells[-1].shape == (h, w, 3)
    return [None if n in sheet.get("empty", []) else cell for n, cell in enumerate(cells)]


def close(tile, picture, tolerance):
    """Whether a tile is a picture, up to rounding; None: up to what WebP does to edges."""
    expected = picture.permute(1, 2, 0).numpy() * 255
    off = np.abs(tile - expected)
    return tile.shape == expected.shape and (
        off.mean() < 4 if tolerance is None else off.max() <= tolerance
    )


def test_the_folder_contains_exactly_the_files_that_the_page_needs(page):
    there = {
        path.relative_to(page.parent).as_posix()
        for path in page.parent.rglob("*")
        if path.is_file()
    }
    assert needed_files(page) == there


def test_the_page_is_well_formed_and_accessible(page):
    outline = Outline(page.read_text())
    ids = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in outline.elements:
        assert attributes.get("aria-labelledby", ids[0]) in ids
    assert all("alt" in attributes for attributes in outline.all("img"))
    assert all(a["aria-label"] for a in outline.all("span") if a.get("role") == "img")
    assert len(outline.all("h1")) == 1 and len(outline.all("main")) == 1
    levels = [int(tag[1]) for tag, _ in outline.elements if re.fullmatch("h[1-6]", tag)]
    assert all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False))
    assert outline.all("html")[0]["lang"] == "en"


def test_nothing_refers_to_another_site(page):
    for path in page.parent.rglob("*"):
        if path.suffix in (".html", ".css", ".js"):
            assert not re.search(r"https?:|//[a-z]+\.|@import|fetch\(|XMLHttp", path.read_text()), (
                path
            )


def test_hostile_names_are_text_and_not_paths(page):
    text = page.read_text()
    outline = Outline(text)
    assert all(a.get("src") != "x" and "onerror" not in a for _, a in outline.elements)
    data = page_data(page)
    assert data["title"] == f"A network {HOSTILE}"
    assert [layer["name"] for layer in data["layers"]] == list(LAYERS)
    assert data["images"][0]["name"] == f"0 {HOSTILE}"
    maps = script_data(page, data["layers"][0]["scripts"][0])["maps"]
    assert maps[0]["examples"][1]["image"] == HOSTILE
    assert [HOSTILE, HOSTILE] in maps[0]["statistics"]
    for name in needed_files(page):
        assert re.fullmatch(r"[A-Za-z0-9_./-]+", name) and ".." not in name


def test_tiles_are_where_the_page_says_and_keep_their_pixels(page):
    small, large = page_data(page)["layers"][:2]
    for layer, start, size, tolerance in ((small, 0, 8, 0.51), (large, 20, 40, None)):
        maps = script_data(page, layer["scripts"][0])["maps"]
        for k in (0, 7, 11):
            for kind, first, count in (
                *(("deconv", k, 3), ("guided", 300 + k, 3), ("patches", 100 + k, 3)),
                ("spectrum", 200, 1),
            ):
                tiles = tiles_of(page, maps[k]["sheets"][kind])
                given = tones(start + first, count, size=size)
                assert len(tiles) == count
                for tile, picture in zip(tiles, given, strict=True):
                    assert close(tile, picture, tolerance)
                if kind != "spectrum":
                    assert close(tiles_of(page, layer["sheets"][kind])[k], given[0], tolerance)
        assert tiles_of(page, layer["sheets"]["deconv"])[3] is None
        for tile, number in zip(tiles_of(page, layer["control"]["sheet"]), (450, 451), strict=True):
            assert close(tile, tone(number, size=size), tolerance)
        assert layer["control"]["maps"] == [[0, 0, 2], [7, 2, 0]]
    evolution, sources = (maps[4]["sheets"][key] for key in ("evolution", "sources"))
    assert close(tiles_of(page, evolution)[1], tone(401), 0.51)
    assert close(tiles_of(page, sources)[0], tone(440, size=40), None)
    assert tiles_of(page, sources)[1] is None


def test_zero_is_the_same_grey_everywhere(tmp_path):
    for size, tolerance in ((20, 0), (64, 4)):  # large tiles are compressed
        signed = torch.full((2, 3, size, size), 0.5)
        signed[:, :, 3:8, 3:8] = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
        shown = GalleryMap(0, {"deconv": signed})
        layer = GalleryLayer("a", "A", [shown])
        page = write_gallery(tmp_path / f"{size}", title="t", layers=[layer])
        tile = tiles_of(page, page_data(page)["layers"][0]["sheets"]["deconv"])[0].astype(int)
        assert np.abs(tile[16:] - 128).max() <= tolerance
        assert np.abs(tile[:, 16:] - 128).max() <= tolerance
        assert close(tile, signed[0], None if tolerance else 0.51)


def test_the_json_of_a_layer_is_what_its_page_shows(page):
    data = page_data(page)
    for number, layer in enumerate(data["layers"]):
        features = json.loads((page.parent / layer["json"]).read_text())
        assert features == script_data(page, layer["scripts"][0])
        assert features["layer"] == LAYERS[number] and features["methods"] == ["deconv", "guided"]
        assert [entry["map"] for entry in features["maps"]] == layer["maps"]
    entry = json.loads((page.parent / data["layers"][1]["json"]).read_text())["maps"][4]
    first = {"image": "a.png", "value": 3.5, "unit": [1, 5], "border": True, "photograph": 0}
    assert entry["examples"][0] == {**first, "box": [0, 4, 12, 16], "window": [-4, 4, 12, 16]}
    assert entry["spectrum"][0]["share"] == 0.5
    assert entry["histogram"] == {"counts": [3, 0, 1], "edges": [0, 1, 2, 3], "silent": 2}
    assert (entry["similar"], entry["coactive"]) == ([[5, 0.75]], [[6, 0.5]])
    assert entry["sources"] == [{"maps": [1], "weight": 2.0}, {"maps": [2, 3], "weight": 1.0}]


def test_every_photograph_is_written_once_and_knows_its_maps(page):
    found = page_data(page)["photographs"]
    # In the order in which examples mention them; what no example mentions is left out.
    assert [entry[0] for entry in found["images"]] == ["folder/a.png", HOSTILE, "folder/c.png"]
    tiles = tiles_of(page, found["sheets"][0])
    for tile, number in zip(tiles, (462, 460, 461), strict=True):
        assert close(tile, tone(number, size=40), None)
    name, pixels, shown, maps, file = found["images"][0]
    assert (pixels, shown, file) == ([40, 40], [40, 40], None)
    assert maps == [[layer, k] for layer in range(3) for k in range(12) if k != 3]


def test_bytes_and_floats_give_the_same_files(tmp_path):
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (2, 3, 9, 5), generator=generator, dtype=torch.uint8)
    forms = [pictures / 255, pictures.permute(0, 2, 3, 1).numpy()]
    found = []
    for number, form in enumerate(forms):
        layer = GalleryLayer("a", "A", [GalleryMap(0, {"deconv": form}, form, filter=form[0])])
        page = write_gallery(tmp_path / str(number), title="t", layers=[layer])
        found.append(
            {p.relative_to(page.parent): p.read_bytes() for p in page.parent.rglob("*.png")}
        )
    assert found[0] == found[1] and len(found[0]) == 5
    sheet = page_data(page)["layers"][0]["sheets"]["filters"]
    assert (tiles_of(page, sheet)[0] == forms[1][0]).all()


def test_large_tiles_are_reduced_and_small_ones_kept(tmp_path):
    layers = [
        GalleryLayer("large", "L", [GalleryMap(0, {"deconv": tones(9, 1, size=200)[..., :100]})]),
        GalleryLayer("small", "S", [GalleryMap(0, {"deconv": tones(9, 1, size=3)})]),
    ]
    page = write_gallery(tmp_path / "g", title="t", layers=layers)
    data = page_data(page)
    large, small = (layer["sheets"]["deconv"] for layer in data["layers"])
    assert (large["height"], large["width"]) == (128, 64)
    assert (small["height"], small["width"]) == (3, 3)
    enlarged = script_data(page, data["layers"][0]["scripts"][0])["maps"][0]["sheets"]["deconv"]
    assert (enlarged["height"], enlarged["width"]) == (160, 80)


@pytest.fixture(scope="module")
def full_page(tmp_path_factory):
    """A page whose tiles were reduced, and whose photograph is larger than its thumbnail.

    In full size, tiles have other colours, so that one can tell which is shown.
    """
    example = Example("a", 2.0, 0, window=(-20, 40, 180, 240))
    projections = torch.cat([tones(number, 2, size=100) for number in (109, 119)])
    pixels = (255 * projections).round().byte().permute(0, 2, 3, 1).numpy()
    factors = {"deconv": [(2.0, 1.0), (1.5, 1.0)], "guided": [(1.0, 1.0), (1.0, 1.0)]}
    shown = GalleryMap(
        *(5, {"deconv": tones(9, 2), "guided": tones(19, 2)}, tones(29, 2), [example, example]),
        sheet=ProjectionSheet(webp(to_sheet(list(pixels)), 95, 4), (100, 100), factors),
    )
    photograph = torch.cat([tone(460, size=240), tone(470, size=240)], 2)[:, :200]
    return write_gallery(
        tmp_path_factory.mktemp("full") / "gallery",
        title="t",
        layers=[GalleryLayer("a", "A", [shown])],
        photographs=Photographs(["a"], [photograph]),
    )


def test_projections_and_photographs_are_beside_the_page_in_full_size(full_page):
    data = page_data(full_page)
    sheets = script_data(full_page, data["layers"][0]["scripts"][0])["maps"][0]["sheets"]
    for method, number in (("deconv", 109), ("guided", 119)):
        found = tiles_of(full_page, sheets[method])
        assert len(found) == 2
        for n in range(2):
            assert close(found[n], tone(number + n, size=100), None)
    assert sheets["deconv"]["contrast"] == [[2, 1], [1.5, 1]]
    # One file for both methods, and another for the patches.
    assert sheets["deconv"]["file"] == sheets["guided"]["file"] != sheets["patches"]["file"]
    file = data["photographs"]["images"][0][4]
    assert file["pixels"] == [200, 480] and (file["height"], file["width"]) == (200, 480)
    there = {p.relative_to(full_page.parent).as_posix() for p in full_page.parent.rglob("*.*")}
    assert needed_files(full_page) == there


def test_whole_photographs_are_reduced_if_they_are_many(tmp_path, monkeypatch):
    def sides(pixels):
        monkeypatch.setattr(photographs, "PIXELS", pixels)
        written = Photographs(["a", "b"], [tone(460, size=300), tone(461, size=300)])
        written.use(0), written.use(1)
        return [entry[4] and entry[4]["width"] for entry in written.write(tmp_path)["images"]]

    assert sides(2 * 300**2) == [300, 300]
    assert sides(2 * 200**2) == [200, 200]
    assert sides(2 * 150**2) == [None, None]  # the thumbnail is larger


def test_maps_are_sorted_by_numbers_that_json_can_hold(page):
    layer = page_data(page)["layers"][0]
    assert [key["name"] for key in layer["sort"]] == ["strongest"]
    assert layer["sort"][0]["values"][:5] == [0, 1, 2, None, 4]


def test_facts_are_shown_to_three_digits_and_statistics_stored_with_six(tmp_path):
    given = {"a": 0.012345, "b": -1.5, "c": 12345.6, "d": 7, "e": np.float32(0.25), "f": "1.00"}
    shown = GalleryMap(0, {"deconv": tones(0)}, statistics={**given, "g": 0.12345678})
    layer = GalleryLayer("a", "A", [shown], facts=given)
    page = write_gallery(tmp_path / "g", title="t", layers=[layer])
    data = page_data(page)["layers"][0]
    said = {"a": "0.0123", "b": "−1.5", "c": "12346", "d": "7", "e": "0.25", "f": "1.00"}
    assert dict(data["facts"]) == {"maps": "1", **said}
    stored = dict(script_data(page, data["scripts"][0])["maps"][0]["statistics"])
    assert stored == {**given, "g": 0.123457}
    assert [key["name"] for key in data["sort"]] == ["a", "b", "c", "d", "e", "g"]


def test_maps_are_read_one_at_a_time(tmp_path):
    earlier = []

    def maps():
        for number in range(4):
            # Of all maps before the last one nothing is held.
            assert all(tensor() is None for tensor in earlier[:-1])
            made = some_map(number)
            earlier.append(weakref.ref(made.projections["deconv"]))
            yield made
            del made

    def layers():
        for name in "ab":
            yield GalleryLayer(name, name, maps())
            # The layer is written before the next one is asked for.
            assert list(tmp_path.glob(f".deconvnet/g.new/layers/*-{name}/deconv.png"))

    photographs = some_photographs()
    write_gallery(tmp_path / "g", title="t", layers=layers(), photographs=photographs)
    assert len(earlier) == 8


def test_an_older_gallery_is_replaced_as_a_whole(tmp_path):
    write(tmp_path / "g")
    page = write(tmp_path / "g", layers=[GalleryLayer("new", "New", [some_map(0)])], images=())
    assert "New" in page.read_text()
    assert len(list((tmp_path / "g/layers").iterdir())) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [".deconvnet", "g"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_kill_leaves_the_old_gallery(tmp_path):
    old = write(tmp_path / "g").read_bytes()

    def deadly():
        yield from some_layers()
        os._exit(9)

    child = os.fork()
    if child == 0:
        try:
            write(tmp_path / "g", layers=deadly())
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert (tmp_path / "g/index.html").read_bytes() == old
    # What the kill left is cleared away by the next one.
    write(tmp_path / "g")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".deconvnet", "g"]


def test_a_kill_between_the_two_renames_is_undone_by_the_next_writer(tmp_path):
    write(tmp_path / "g")
    (tmp_path / "g").rename(tmp_path / ".deconvnet/g.old")
    with pytest.raises(ValueError, match="at least one"):
        write(tmp_path / "g", layers=[])
    assert (tmp_path / "g/index.html").is_file()


def test_an_error_leaves_the_old_gallery_and_nothing_else(tmp_path):
    old = write(tmp_path / "g").read_bytes()
    with pytest.raises(ValueError, match="no maps"):
        write(tmp_path / "g", layers=[*some_layers(), GalleryLayer("empty", "Empty", [])])
    assert (tmp_path / "g/index.html").read_bytes() == old
    assert sorted(path.name for path in tmp_path.iterdir()) == [".deconvnet", "g"]


def test_a_folder_of_other_things_is_not_replaced(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/network.safetensors").write_text("precious")
    (tmp_path / "run/index.html").write_text("<title>my page</title>")
    with pytest.raises(ValueError, match=r"did not make \(index.html, network.safetensors\)"):
        write(tmp_path / "run")
    with pytest.raises(ValueError, match="is not a folder that deconvnet made"):
        write(tmp_path / "run/index.html")
    assert (tmp_path / "run/network.safetensors").read_text() == "precious"


@pytest.mark.parametrize("what", ["a file", "an edited page", "a link", "a folder"])
def test_a_gallery_that_somebody_has_added_to_is_not_replaced(tmp_path, what):
    page = write(tmp_path / "g")
    if what == "a file":
        (tmp_path / "g/layers/notes.txt").write_text("precious")
    elif what == "an edited page":
        page.write_text(page.read_text().replace("<title>", "<title>My "))
    elif what == "a link":
        (tmp_path / "g").rename(tmp_path / "elsewhere")
        (tmp_path / "g").symlink_to(tmp_path / "elsewhere")
    else:
        (tmp_path / "g/mine").mkdir()
        (tmp_path / "g/mine/thesis.txt").write_text("precious")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    if what == "a link":
        assert not list((tmp_path / "elsewhere").rglob("notes.txt"))
    with pytest.raises(ValueError, match=r"(did not|deconvnet) ma[dk]e"):
        write(tmp_path / "g")
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {p: b for p, b in after.items() if ".deconvnet" not in p.parts} == {
        p: b for p, b in before.items() if ".deconvnet" not in p.parts
    }


def test_names_that_are_not_valid_text_are_shown(tmp_path):
    name = os.fsdecode(b"caf\xe9 </script>\n.png")
    shown = GalleryMap(0, {"deconv": tones(0, 1)}, tones(0, 1), [Example(name, 1.0)])
    layer = GalleryLayer("café", name, [shown], facts={"fact": name})
    image = GalleryImage(name, torch.rand(3, 8, 8))
    page = write_gallery(
        tmp_path / "g", title=name, layers=[layer], images=[image], notes=[name], facts={"a": name}
    )
    for path in (tmp_path / "g").rglob("*"):
        if path.suffix in (".html", ".js"):
            path.read_text(encoding="utf-8")
    data = page_data(page)
    assert data["images"][0]["name"] == r"caf\xe9 </script>\n.png"
    maps = script_data(page, data["layers"][0]["scripts"][0])["maps"]
    assert maps[0]["examples"][0]["image"].startswith(r"caf\xe9")


def one(*maps, **options):
    return {"layers": [GalleryLayer("a", "A", maps)], "images": (), **options}


@pytest.mark.parametrize(
    "options, message",
    [
        (one(some_map(1), some_map(1)), "layer 'a', map 1: twice"),
        (
            {"layers": [GalleryLayer("a", "A", [some_map(0)]) for _ in "ab"]},
            "layer 'a': given twice",
        ),
        (one(GalleryMap(7, {"deconv": torch.rand(2, 8, 8)})), r"7, deconv: .*\(8, 8\); expected"),
        (one(GalleryMap(7, {"a": torch.zeros(2, 3, 4, 4).long()})), "7, a: torch.int64"),
        (one(GalleryMap(7, {"a": tones(0) - 0.5})), r"7, a: .*expected \[0, 1\]"),
        (one(GalleryMap(7, {"a": tones(0) * torch.nan})), "values from nan to nan"),
        (one(GalleryMap(7, {"a": tones(0)}, tones(0, 2))), "3 projections and 2 patches"),
        (one(GalleryMap(7, {"a": tones(0), "b": tones(0, 2)})), "3 projections and 2 b"),
        (one(GalleryMap(7, {"a": tones(0)}, None, [Example("a", 1.0)])), "3 projections and 1 ex"),
        (one(GalleryMap(7, evolution=tones(0), epochs=(1,))), "3 pictures .* 1 epochs"),
        (one(GalleryMap(7, spectrum=[Example("a", 1.0)])), "0 patches of its spectrum and 1 exam"),
        (one(GalleryMap(7, filter=torch.rand(3, 0, 4))), "no pixels"),
        (one(some_map(0), figures=[Figure(torch.rand(4, 5), "f")]), "figure 'f'"),
        (one(some_map(0), photographs=Photographs(["a"], [tone(0)])), "photograph 2: there are 1"),
        (one(some_map(0), images=some_images()), "image .*: layer 'features.8#1' is not in this"),
    ],
)  # fmt: skip
def test_mismatched_content_is_refused_by_name(tmp_path, options, message):
    with pytest.raises(ValueError, match=message) as refused:
        write(tmp_path / "g", **options)
    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] in ([], [".deconvnet"])


# ---- in a browser ------------------------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# A browser speaks through the descriptors 3 and 4; which ones Python has open is chance.
LAUNCH = """
import os, sys
for number, name in enumerate(sys.argv[1:3]):
    os.dup2(int(name), 200 + number)
os.dup2(200, 3), os.dup2(201, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
KEYS = {
    "Enter": 13,
    "Escape": 27,
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
    "/": 191,
}


class Browser:
    """One window of a headless Chromium, told what to do in its own protocol over a pipe."""

    def __init__(self, program, profile):
        theirs, self.orders = os.pipe()
        self.answers, ours = os.pipe()
        flags = (
            "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
            "--disable-background-networking --disable-component-update --hide-scrollbars "
            f"--remote-debugging-pipe --user-data-dir={profile}"
        ).split()
        command = [sys.executable, "-S", "-c", LAUNCH, str(theirs), str(ours), program, *flags]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([*command, "about:blank"], pass_fds=(theirs, ours), **quiet)
        os.close(theirs)
        os.close(ours)
        self.count, self.buffer, self.events, self.session = 0, b"", [], {}
        targets = self.tell("Target.getTargets")["targetInfos"]
        window = next(target["targetId"] for target in targets if target["type"] == "page")
        found = self.tell("Target.attachToTarget", targetId=window, flatten=True)
        self.session = {"sessionId": found["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.tell(f"{domain}.enable")

    def _read(self):
        while b"\0" not in self.buffer:
            if not select.select([self.answers], [], [], 30)[0]:
                raise TimeoutError("the browser does not answer")
            more = os.read(self.answers, 1 << 20)
            if not more:
                raise EOFError("the browser has ended")
            self.buffer += more
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def tell(self, method, **parameters):
        self.count += 1
        order = {"id": self.count, "method": method, "params": parameters, **self.session}
        os.write(self.orders, json.dumps(order).encode() + b"\0")
        while True:
            message = self._read()
            if message.get("id") == self.count:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def value(self, expression):
        """What an expression gives in the page; a promise is waited for."""
        options = {"awaitPromise": True, "returnByValue": True}
        answer = self.tell("Runtime.evaluate", expression=expression, **options)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, expression):
        """Wait until an expression is true in the page; its value."""
        end = time.monotonic() + 20
        while not (value := self.value(expression)):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.01)
        return value

    def show(self, page, place="", *, width=1200, height=900, dark=False):
        """Open a page from its path, in a window of this size, and wait until it is there."""
        size = {"deviceScaleFactor": 1, "mobile": width < 600}
        self.tell("Emulation.setDeviceMetricsOverride", width=width, height=height, **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.tell("Emulation.setEmulatedMedia", features=[scheme])
        # Another query, so that the page is reloaded if only the fragment differs.
        self.tell("Page.navigate", url=f"{page.as_uri()}?{self.count}{place}")
        self.until("document.readyState === 'complete' && typeof gallery === 'object'")
        if place:
            self.until("!document.getElementById('view').hidden")

    def click(self, selector):
        self.value(f"document.querySelector({json.dumps(selector)}).click()")

    def press(self, key):
        event = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        text = {"text": "\r"} if key == "Enter" else {"text": key} if len(key) == 1 else {}
        self.tell("Input.dispatchKeyEvent", type="keyDown", **event, **text)
        self.tell("Input.dispatchKeyEvent", type="keyUp", **event)

    def heading(self, wanted):
        """Wait for a view by its heading."""
        self.until(f"document.querySelector('#view h1')?.textContent === {json.dumps(wanted)}")

    def color(self, selector):
        """The colour in the middle of an element, as it is on the screen."""
        box = self.value(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
            "return [b.x + b.width / 2 + scrollX, b.y + b.height / 2 + scrollY] })()"
        )
        clip = {"x": box[0] - 2, "y": box[1] - 2, "width": 4, "height": 4, "scale": 1}
        shot = self.tell("Page.captureScreenshot", clip=clip)["data"]
        with Image.open(io.BytesIO(base64.b64decode(shot))) as image:
            return np.asarray(image.convert("RGB")).reshape(-1, 3).mean(0)

    def problems(self):
        """Everything that went wrong since it was last asked for."""
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        found = [e for e in self.events if e["method"] in (*kinds, "Network.loadingFailed")]
        asked = [
            e["params"]["request"]["url"]
            for e in self.events
            if e["method"] == "Network.requestWillBeSent"
        ]
        self.events.clear()
        return found + [url for url in asked if not url.startswith(("file:", "data:", "about:"))]

    def close(self):
        try:
            self.tell("Browser.close")
            self.process.wait(10)
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self.orders)
            os.close(self.answers)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None or os.name == "nt":
        pytest.skip("no Chromium here")
    try:
        browser = Browser(program, tmp_path_factory.mktemp("profile"))
    except (EOFError, TimeoutError, BrokenPipeError) as error:
        pytest.skip(f"{program} does not start here: {error}")
    yield browser
    browser.close()


def address(layer, **more):
    """The part of an address after the "#"."""
    return f"#layer={quote(layer, safe='')}" + "".join(f"&{k}={v}" for k, v in more.items())


def test_clicks_lead_from_the_network_to_a_layer_a_map_an_activation_an_image(browser, page):
    browser.show(page)
    assert browser.value("document.querySelectorAll('.flow li').length") == 4
    browser.click(".layer h3 a")
    browser.heading("Layer 1")
    assert browser.value("document.querySelectorAll('.grid li').length") == 12
    browser.click(".grid [data-map='7']")
    browser.heading("Layer 1, map 7")
    assert browser.value("location.hash") == address(LAYERS[0], map=7)
    # Three examples: two projections and the patch of each, and a photograph where there is one.
    assert browser.value("document.querySelectorAll('.examples')[0].children.length") == 3
    counts = (
        "[...document.querySelector('.examples').children]"
        ".map(e => e.querySelectorAll('.tile').length)"
    )
    assert browser.value(counts) == [4, 4, 3]
    browser.click(".examples button")
    browser.until("document.getElementById('zoom').open")
    said = browser.value("document.getElementById('zoomed').textContent")
    assert said == "1 of 3: 3.5 in a.png, rows 0–12, columns 4–16, at the border"
    assert browser.value("document.querySelectorAll('#zoom .tile').length") == 4
    browser.press("ArrowRight")
    # Names are text, whatever they look like.
    assert HOSTILE in browser.value("document.getElementById('zoomed').textContent")
    browser.press("Escape")
    browser.until("!document.getElementById('zoom').open")
    browser.heading("Layer 1, map 7")
    browser.value("history.back()")
    browser.heading("Layer 1")
    browser.value("history.back()")
    browser.until("!document.getElementById('overview').hidden")
    browser.click(".images a")
    browser.heading(f"0 {HOSTILE}")
    links = "[...document.querySelectorAll('.seen .row a')].map(a => a.hash)"
    assert address(LAYERS[0], map=2) in browser.value(links)
    # Where an activation paints is framed in the image: here in rows 10 to 18 of 48.
    assert browser.value("document.querySelector('.image .box')") is None
    browser.value("document.querySelector('.seen .row a').focus()")
    top, height = browser.value(
        "(e => [e.style.top, e.style.height].map(parseFloat))"
        "(document.querySelector('.image .box'))"
    )
    assert (top, height) == pytest.approx((100 * 10 / 48, 100 * 8 / 48), abs=1e-3)
    # A map that this gallery does not have is named, and no link.
    text = browser.value("document.querySelector('.seen').textContent")
    assert "map 99" in text and not any("99" in link for link in browser.value(links))
    assert browser.value("document.querySelector('#view .notice')") is None
    assert browser.problems() == []


def test_a_tile_opens_in_full_size_next_to_its_photograph_and_on_it(browser, full_page):
    def near(selector, number):
        """Whether an element gets this colour, as soon as its picture is loaded."""
        for _ in range(100):
            if np.abs(browser.color(selector) - tone(number)[:, 0, 0].numpy() * 255).max() <= 3:
                return True
            time.sleep(0.02)
        return False

    def large_files():
        asked = [e for e in browser.events if e["method"] == "Network.requestWillBeSent"]
        names = " ".join(event["params"]["request"]["url"] for event in asked)
        return ["5-projections" in names, "whole/1" in names]

    browser.show(full_page, "#layer=a&map=5")
    # The contrast of a reduced tile is raised: the distance from grey is twice that of the file.
    color = browser.color(".examples li:nth-child(1) .tile")
    expected = (0.5 + 2 * (tone(109)[:, 0, 0].numpy() - 0.5)).clip(0, 1) * 255
    assert np.abs(color - expected).max() <= 5
    assert large_files() == [True, False]
    browser.value("document.querySelector('.examples button').focus()")
    browser.press("Enter")
    browser.until("document.getElementById('zoom').open")
    panel = "#zoom .panel:nth-child({})"
    assert near(panel.format(1) + " .tile", 109) and near(panel.format(2) + " .tile", 119)
    assert near(panel.format(3) + " .frame", 460)  # the middle of the patch is at column 140
    # The window reaches beyond the photograph, and the frame does not.
    box = "(e => [e.style.top, e.style.left, e.style.height, e.style.width].map(parseFloat))"
    assert browser.value(f"{box}(document.querySelector('#zoom .box'))") == pytest.approx(
        [0, 100 * 40 / 480, 90, 100 * 200 / 480]
    )
    assert large_files() == [True, True]
    browser.press("ArrowRight")
    assert near(panel.format(1) + " .tile", 110)
    browser.click("#over")
    assert browser.value("document.querySelectorAll('#zoom .panel').length") == 3
    within = (
        "(() => { const [a, b] = ['.placed', '.frame'].map(s =>"
        "document.querySelector(`#zoom ${s}`).getBoundingClientRect());"
        "return [(a.top - b.top) / b.height, (a.left - b.left) / b.width,"
        "a.height / b.height, a.width / b.width] })()"
    )
    assert browser.value(within) == pytest.approx([-0.1, 40 / 480, 1, 200 / 480], abs=0.01)
    assert near(panel.format(1) + " .placed", 110) and near(panel.format(2) + " .placed", 120)
    browser.click("#over")
    assert browser.value("document.querySelectorAll('#zoom .panel').length") == 4
    browser.press("Escape")
    browser.until("!document.getElementById('zoom').open")
    assert browser.value("document.activeElement.dataset.key") == "example-0"
    assert browser.problems() == []


def test_a_page_of_recordings_calls_them_so(browser, tmp_path):
    example = Example("a", 2.0, 0, window=(0, 4, 1, 12), box=(0, 3, 1, 13), border=True)
    signal = torch.linspace(0, 1, 40).expand(3, 1, 40)
    shown = GalleryMap(0, {"generative": signal[None]}, signal[None], [example])
    page = write_gallery(
        tmp_path / "page",
        title="t",
        layers=[GalleryLayer("a", "A", [shown], shape=(1, 1, 30), field=(1, 10), stride=(1, 2))],
        images=[GalleryImage("a", signal, photograph=0)],
        photographs=Photographs(["a"], [signal]),
        words=RECORDINGS,
    )
    for place in ("", "#layer=a", "#layer=a&map=0", "#image=1", "#photo=0"):
        browser.show(page, place)
        text = browser.value("document.body.innerText")
        assert not re.search("image|photograph|pixel|rows", text, re.IGNORECASE), text
    browser.show(page, "#layer=a&map=0")
    label = browser.value("document.querySelector('.examples button').getAttribute('aria-label')")
    assert label == "Enlarge example 1: 2 in a, times 4–12, at the border"
    browser.show(page, "#layer=a")
    text = browser.value("document.body.innerText")
    assert "10 samples" in text and "2 samples" in text
    assert browser.problems() == []


def test_the_keyboard_goes_everywhere(browser, page):
    browser.show(page, address(LAYERS[1]))
    browser.value("document.querySelector('.grid a').focus()")
    browser.press("ArrowRight")
    browser.press("ArrowRight")
    assert browser.value("document.activeElement.dataset.map") == "2"
    browser.press("Enter")
    browser.heading("Layer 2, map 2")
    browser.press("ArrowRight")
    browser.heading("Layer 2, map 3")
    assert "never active" in browser.value("document.getElementById('view').textContent")
    browser.press("ArrowRight")
    browser.heading("Layer 2, map 4")
    assert browser.value("document.querySelectorAll('[aria-labelledby=evolution] li').length") == 2
    browser.press("Escape")
    browser.heading("Layer 2")
    # Focus is on the map that one comes from.
    assert browser.value("document.activeElement.dataset.map") == "4"
    browser.press("Escape")
    browser.until("!document.getElementById('overview').hidden")
    assert browser.value("document.activeElement.hash") == address(LAYERS[1])
    assert browser.problems() == []


def test_maps_are_sorted_found_and_shown_by_both_methods(browser, page):
    shown = "[...document.querySelectorAll('.grid a')].map(a => Number(a.dataset.map))"
    browser.show(page, address(LAYERS[0], sort="strongest", show="deconv,guided"))
    assert browser.value(shown) == [4, 9, 8, 2, 7, 1, 6, 11, 0, 5, 10, 3]
    assert browser.value("document.querySelectorAll('.grid .tile').length") == 24
    browser.click("[data-key='turn']")
    browser.until("location.hash.includes('sort=-strongest')")
    browser.until(f"({shown})[0] === 0")
    # The neighbours of a map are those of this order.
    browser.click("[data-map='5']")
    browser.heading("Layer 1, map 5")
    browser.press("ArrowRight")
    browser.heading("Layer 1, map 10")
    browser.press("Escape")
    browser.heading("Layer 1")
    browser.value(
        "(() => { window.type = (selector, text) => { const e = document.querySelector(selector);"
        "e.value = text; e.dispatchEvent(new Event('input')) }; type('[data-key=find]', '1') })()"
    )
    assert browser.value(shown) == [10, 1, 11]
    # Words are those of labels, and of the images among the examples of a map.
    for words, found in (("zebra", [5]), ("A.PNG 7", [7]), ("nowhere", []), ("", [0, 5, 10])):
        browser.value(f"type('[data-key=find]', {json.dumps(words)})")
        assert browser.value(shown)[:3] == found, words
    assert browser.problems() == []


def test_every_tile_on_the_screen_is_the_one_it_claims_to_be(browser, page):
    def near(color, number):
        return np.abs(color - tone(number)[:, 0, 0].numpy() * 255).max() <= 3

    browser.show(page)
    # Nine of the eleven maps that are alive, each by both methods and with its patch.
    for n, k in ((1, 0), (4, 5), (9, 11)):
        item = f".thumbnails li:nth-child({n}) .tile"
        for place, number in enumerate((k, 300 + k, 100 + k), 1):
            assert near(browser.color(f"{item}:nth-child({place})"), number), k
    browser.show(page, address(LAYERS[1]))
    for k in (0, 5, 8, 11):
        assert near(browser.color(f"[data-map='{k}'] .tile"), 20 + k), k
    browser.show(page, address(LAYERS[0], map=7))
    for n in range(3):
        column = f".examples li:nth-child({n + 1}) .tile"
        assert near(browser.color(f"{column}:nth-child(1)"), 7 + n)
        assert near(browser.color(f"{column}:nth-child(2)"), 307 + n)
        assert near(browser.color(f"{column}:nth-child(3)"), 107 + n)
    assert near(browser.color(".examples li:nth-child(2) .photo .tile"), 460)
    assert near(browser.color("#spectrum ~ .examples .tile"), 200)
    assert near(browser.color("#control ~ ul li:nth-child(2) .tile"), 451)
    browser.show(page, "#image=2")
    assert near(browser.color(".framed img"), 71)
    assert near(browser.color(".seen .row li:nth-child(2) .tile"), 2)


# The layers and maps that links lead to.
TARGETS = (
    "[...document.querySelectorAll('%s')].map(a => gallery.address(a.hash)).map(at =>"
    "at.layer === undefined ? at.photo : at.map === undefined ? at.layer : [at.layer, at.map])"
)


def test_the_place_of_an_example_is_framed_on_its_photograph(browser, page):
    browser.show(page, address(LAYERS[1], map=7))
    frames = (
        "[...document.querySelectorAll('.examples .box')].map(e =>"
        "[e.style.top, e.style.left, e.style.height, e.style.width].map(parseFloat))"
    )
    # The window reaches from row -4 to 12 and from column 4 to 16 of 40: what lies in the image.
    assert browser.value(frames) == [pytest.approx([0, 10, 30, 30])]
    browser.show(page, "#photo=0")
    maps = [[layer, k] for layer in LAYERS for k in range(12) if k != 3]
    assert browser.value(TARGETS % "#view .row a") == maps
    assert browser.problems() == []


def test_a_map_leads_to_its_relatives(browser, page):
    browser.show(page, address(LAYERS[1], map=4))
    links = "[...document.querySelectorAll('[aria-labelledby=%s] .row a')].map(a => a.hash)"
    assert browser.value(links % "similar") == [address(LAYERS[1], map=5)]
    assert browser.value(links % "coactive") == [address(LAYERS[1], map=6)]
    below = browser.value(links % "sources")
    assert below == [address(LAYERS[0], map=1), address(LAYERS[0], map=2)]
    # Maps 2 and 3 are pooled, so both are used.
    for number, used in ((1, 1), (3, 1), (5, 0)):
        browser.show(page, address(LAYERS[0], map=number))
        assert browser.value(links % "users") == [address(LAYERS[1], map=4)] * used
    bars = "[...document.querySelectorAll('.histogram .bar')].map(e => e.height.baseVal.value)"
    assert browser.value(bars) == [120, 0, 40]
    control = browser.value("document.querySelector('.control').textContent")
    assert "Map 7: dead in the control" in control
    assert browser.problems() == []


def test_search_finds_maps_layers_labels_and_images(browser, page):
    browser.show(page)
    browser.press("/")
    assert browser.value("document.activeElement.id") == "search"
    for words, found in (
        ("layer 2", [LAYERS[1]]),
        ("zebra", [[LAYERS[0], 5]]),
        ("11", [[layer, 11] for layer in LAYERS]),
        ("layer map 7", [[layer, 7] for layer in LAYERS]),
        ("folder/c", [2]),
        ("nothing of this name", []),
    ):
        browser.value(
            f"(e => {{ e.value = {json.dumps(words)}; e.dispatchEvent(new Event('input')) }})"
            "(document.getElementById('search'))"
        )
        assert browser.value(TARGETS % "#results a")[: max(1, len(found))] == found, words
    browser.value("(e => { e.value = 'zebra'; e.dispatchEvent(new Event('input')) })(search)")
    browser.press("Enter")
    browser.heading("Layer 1, map 5")
    assert browser.problems() == []


def test_activations_are_switched_on_and_off_and_the_error_follows(browser, page):
    browser.show(page, f"#image=1&repaint={quote(LAYERS[0], safe='')}")
    error = "document.querySelector('.error').textContent"
    pixels = (
        "(() => { const c = document.createElement('canvas')"
        ".getContext('2d', {willReadFrequently: true});"
        "c.drawImage(document.querySelector('.framed canvas'), 0, 0);"
        "return [...c.getImageData(0, 0, 3, 2).data].filter((_, n) => n % 4 === 0) })()"
    )
    # The image is (1, 2, 0), (0, -3, 0): white is 3, grey 0, black -3.
    assert browser.value(pixels) == [170, pytest.approx(212.5, abs=0.5), 128, 128, 0, 128]
    # The image is rounded to 8 bits, and so are tiles: `rest` makes up for these in a real one.
    assert float(browser.value(error).removesuffix(" dB")) > 45
    browser.click(".part:nth-child(2)")
    assert browser.value(pixels) == [170, pytest.approx(212.5, abs=0.5), 128, 128, 128, 128]
    # The mean is 0: 14 of energy, 9 of error.
    assert browser.value(error) == "1.92 dB"
    browser.click("[data-key=invert]")
    assert browser.value(pixels) == [128, 128, 128, 128, 0, 128]
    browser.click("[data-key=none]")
    assert browser.value(pixels) == [128] * 6 and browser.value(error) == "0 dB"
    browser.value(
        "(e => { e.value = 1; e.dispatchEvent(new Event('input')) })"
        "(document.querySelector('[data-key=strongest]'))"
    )
    assert browser.value(pixels) == [170, pytest.approx(212.5, abs=0.5), 128, 128, 128, 128]
    used = "document.querySelector('.controls output:not(.error)').textContent"
    assert browser.value(used) == "1 of 10 activations"
    browser.click(".part:nth-child(3)")
    assert browser.value(used) == "7 of 10 activations"
    browser.click("[data-key=all]")
    assert browser.value(used) == "10 of 10 activations"
    assert browser.problems() == []


@pytest.mark.parametrize("width", [320, 360, 1400])
def test_nothing_is_wider_than_the_browser(browser, page, width):
    everything = "deconv,guided,patches,filters"
    repaint = f"#image=1&repaint={quote(LAYERS[0], safe='')}"
    places = ["", address(LAYERS[1], show=everything), address(LAYERS[1], map=4), "#image=1"]
    places += [repaint, "#photo=1"]
    for place in places:
        browser.show(page, place, width=width)
        wide, window = browser.value("[document.documentElement.scrollWidth, innerWidth]")
        assert window == width and wide <= window, place
    assert browser.problems() == []


def test_light_and_dark_follow_the_system_until_the_user_chooses(browser, page):
    paper = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]"
    browser.show(page, dark=True)
    assert browser.value(paper) < 60
    assert browser.value("document.getElementById('theme').getAttribute('aria-pressed')") == "true"
    browser.click("#theme")
    assert browser.value(paper) > 200
    browser.show(page, dark=True)
    assert browser.value(paper) > 200
    browser.value("localStorage.clear()")
    browser.show(page)
    assert browser.value(paper) > 200


def test_a_wrong_address_shows_a_message(browser, page):
    for place, text in (
        ("#layer=nowhere", "no layer nowhere"),
        (address(LAYERS[0], map=1000), "no map 1000"),
        ("#image=77", "no image 77"),
        ("#photo=9", "no photograph 9"),
        ("#image=2&repaint=layer", "no reconstruction by layer"),
    ):
        browser.show(page, place)
        assert text in browser.until("document.querySelector('#view .notice')?.textContent")
    assert browser.problems() == []


def test_only_large_tiles_of_dense_texture_have_the_lower_quality(tmp_path):
    """150 maps with 34 tiles of 112 pixels each then stay under 8 MB."""
    noise = np.random.default_rng(0).normal(0, 1, (56, 56, 3)).repeat(2, 0).repeat(2, 1)
    for amplitude, quality in ((8, sprites.COARSE), (25, sprites.DENSE)):
        tile = (128 + amplitude * noise).clip(0, 255).astype(np.uint8)
        file = sprites.write_sprite_sheet(tmp_path, f"{amplitude}", [tile])["file"]
        expected = io.BytesIO()
        Image.fromarray(tile).save(expected, "webp", quality=quality, method=4)
        assert (tmp_path / file).read_bytes() == expected.getvalue()


def test_many_maps_lie_in_several_files_of_which_a_view_needs_a_few(tmp_path, monkeypatch):
    monkeypatch.setattr("deconvnet.visualization.gallery.sprites.PAGE", 4)
    monkeypatch.setattr("deconvnet.visualization.gallery.layer_files.PER_SCRIPT", 5)
    maps = [GalleryMap(k, {"deconv": tones(k, 1)}, statistics={"n": k}) for k in range(14)]
    maps[9] = GalleryMap(9)
    maps[13] = GalleryMap(13)
    layer = GalleryLayer("a", "A", maps, facts={})
    page = write_gallery(tmp_path / "g", title="t", layers=[layer])
    assert needed_files(page) == {
        path.relative_to(page.parent).as_posix()
        for path in page.parent.rglob("*")
        if path.is_file()
    }
    data = page_data(page)["layers"][0]
    parts = [script_data(page, name)["maps"] for name in data["scripts"]]
    assert [len(part) for part in parts] == [5, 5, 4] and data["per_script"] == 5
    assert [entry["map"] for part in parts for entry in part] == list(range(14))
    sheet = data["sheets"]["deconv"]
    assert (sheet["per_page"], sheet["count"], sheet["empty"]) == (4, 14, [9, 13])
    for k in (0, 5, 10, 12):
        one = {**sheet, "file": sheet["pages"][k // 4], "first": 0, "count": 4, "empty": []}
        assert close(tiles_of(page, one)[k % 4], tone(k), 0.51)


def test_a_wall_of_many_maps_grows_as_it_is_scrolled_and_the_heat_lies_over_its_photograph(
    browser, tmp_path
):
    hot = Heat(np.array([[0, 255], [0, 0]], np.uint8), (0.0, 0.0, 4.0, 4.0))
    examples = [Example("a", 1.0, 0, window=(0, 0, 2, 2), heat=hot)]
    maps = [GalleryMap(k, filter=tone(k % 200, size=3)) for k in range(700)]
    maps[699] = GalleryMap(699, {"deconv": tones(1, 1)}, tones(1, 1), examples=examples)
    black = Photographs(["a"], [torch.zeros(3, 4, 4)])
    layer = GalleryLayer("a", "concepts", maps, similar_are="filters")
    words = {**IMAGES, **CONCEPT_WORDS}
    page = write_gallery(tmp_path / "g", title="t", layers=[layer], photographs=black, words=words)
    listed = "document.querySelectorAll('.grid li').length"
    browser.show(page, address("a", sort="-number"))
    assert 240 <= browser.value(listed) < 700
    assert browser.value("document.querySelector('.grid a').dataset.map") == "699"
    # The projection of a concept stands next to the image patch.
    assert browser.value("document.querySelectorAll('.grid li:first-child .tile').length") == 2
    browser.until(f"(scrollTo(0, document.body.scrollHeight), {listed} === 700)")
    # Back from a map, its tile is there and has the focus, however far down it is.
    browser.click("[data-map='3']")
    browser.heading("Concept 3")
    browser.value("history.back()")
    browser.heading("concepts")
    browser.until("document.activeElement.dataset.map === '3'")
    browser.show(page, address("a", map=699))
    browser.heading("Concept 699")
    heat = browser.value(
        "(() => { const c = document.querySelector('.examples .hot canvas');"
        "return [...c.getContext('2d').getImageData(0, 0, 2, 2).data].filter((_, n) => n % 4 === 3)"
        "})()"
    )
    assert heat[1] > 200 and [heat[0], *heat[2:]] == [0, 0, 0]
    assert browser.problems() == []
