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

from deconvnet.visualization.gallery.gallery import (
    Caption,
    GalleryImage,
    GalleryLayer,
    GalleryMap,
    ImageLayer,
    Part,
    write_gallery,
)

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
    given = {
        "captions": [Caption("a.png", 3.5, "row 1"), Caption(HOSTILE, -2.0), Caption("b", 0.25)],
        "statistics": {"strongest": float(number % 5), HOSTILE: HOSTILE},
        "control": tones(start + 300, size=size),
    }
    projections, patches = tones(start + number, size=size), tones(start + 100 + number, size=size)
    return GalleryMap(number, projections, patches, **{**given, **options})


def some_layers(*, maps=12, sizes=(8, 40, 8), **options):
    for number, (name, size) in enumerate(zip(LAYERS, sizes, strict=True)):
        made = [some_map(k, start=20 * number, size=size, **options) for k in range(maps)]
        made[3] = GalleryMap(3, None, None, (), {"strongest": float("nan")})
        made[4] = some_map(4, start=20 * number, evolution=tones(400, 2), epochs=(1, 20))
        if number == 0:
            made[5] = some_map(5, filter=tone(5, size=3))
        yield GalleryLayer(
            name,
            f"Layer {number + 1}",
            iter(made),
            kind=HOSTILE,
            shape=(maps, 30 - 5 * number, 20),
            field=(7, 7 + 20 * number),
            stride=(1, 2),
            facts={"density": 0.01},
        )


def some_images(count=2):
    for n in range(count):
        parts = [Part(k, 2.0 - k, tone(k), box=(10, 0, 18, 8)) for k in (1, 2, 99)]
        yield GalleryImage(
            f"{n} {HOSTILE}",
            tone(70 + n, size=48),
            [
                ImageLayer(LAYERS[0], tone(80, size=48), {"SNR": "3 dB"}, [(2, tone(2))], parts),
                ImageLayer(LAYERS[1], None, {}, [(0, tone(0)), (1, tone(1))], parts[:1]),
                ImageLayer(LAYERS[2]),
            ],
        )


def write(folder, **options):
    given = {
        "title": f"A network {HOSTILE}",
        "facts": {HOSTILE: HOSTILE, "images": 3},
        "layers": some_layers(),
        "images": some_images(),
        "figures": {HOSTILE: tone(500, size=20)},
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
    place, content = re.fullmatch(r'gallery\.add\("([^"]*)",\s*(.*)\);\n', text, re.DOTALL).groups()
    assert place == name.rpartition("/")[0]
    return json.loads(re.sub(r",\s*\]$", "]", content))


def files_named(value):
    """All values of "file" and "script" in nested data."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from [item] if key in ("file", "script") else files_named(item)
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
    for entry in (*data["layers"], *data["images"]):
        named.update(files_named(script_data(page, entry["script"])))
    return {name for name in named if not name.startswith(("#", "data:"))} | {page.name}


def tiles_of(page, sheet):
    """The tiles (h, w, 3) of a sheet, cut out of its file; None where one is said to be missing."""
    pixels = np.asarray(Image.open(page.parent / sheet["file"]).convert("RGB"))
    h, w, gap = sheet["height"], sheet["width"], page_data(page)["gap"]
    cells = []
    for n in range(sheet["count"]):
        top, left = n // sheet["columns"] * (h + gap), n % sheet["columns"] * (w + gap)
        cells.append(pixels[top : top + h, left : left + w])
        assert cells[-1].shape == (h, w, 3)
    return [None if n in sheet.get("empty", []) else cell for n, cell in enumerate(cells)]


def close(tile, picture, tolerance):
    """Whether a tile is a picture, up to rounding; None: up to what JPEG does to edges."""
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
    maps = script_data(page, data["layers"][0]["script"])
    assert maps[0]["captions"][1][0] == HOSTILE
    assert [HOSTILE, HOSTILE] in maps[0]["statistics"]
    for name in needed_files(page):
        assert re.fullmatch(r"[A-Za-z0-9_./-]+", name) and ".." not in name


def test_tiles_are_where_the_page_says_and_keep_their_pixels(page):
    small, large = page_data(page)["layers"][:2]
    for layer, start, size, tolerance in ((small, 0, 8, 0.51), (large, 20, 40, 2.51)):
        maps = script_data(page, layer["script"])
        for k in (0, 7, 11):
            for kind, first in (("projections", k), ("patches", 100 + k), ("control", 300)):
                lost = None if kind == "patches" and size > 32 else tolerance
                tiles = tiles_of(page, maps[k]["sheets"][kind])
                given = tones(start + first, size=size)
                assert len(tiles) == 3
                for tile, picture in zip(tiles, given, strict=True):
                    assert close(tile, picture, lost)
                assert close(tiles_of(page, layer["sheets"][kind])[k], given[0], lost)
        assert tiles_of(page, layer["sheets"]["projections"])[3] is None


def test_zero_is_the_same_grey_everywhere(tmp_path):
    signed = torch.full((2, 3, 50, 50), 0.5)
    signed[:, :, 10:20, 10:20] = torch.rand(
        2, 3, 10, 10, generator=torch.Generator().manual_seed(0)
    )
    shown = GalleryMap(0, signed, None)
    page = write_gallery(tmp_path / "g", title="t", layers=[GalleryLayer("a", "A", [shown])])
    tile = tiles_of(page, page_data(page)["layers"][0]["sheets"]["projections"])[0]
    assert (tile[30:] == 128).all() and (tile[:, 30:] == 128).all()
    assert close(tile, signed[0], 2.51)


def test_bytes_and_floats_give_the_same_files(tmp_path):
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (2, 3, 9, 5), generator=generator, dtype=torch.uint8)
    forms = [pictures / 255, pictures.permute(0, 2, 3, 1).numpy()]
    found = []
    for number, form in enumerate(forms):
        layer = GalleryLayer("a", "A", [GalleryMap(0, form, form, filter=form[0])])
        page = write_gallery(tmp_path / str(number), title="t", layers=[layer])
        found.append(
            {p.relative_to(page.parent): p.read_bytes() for p in page.parent.rglob("*.png")}
        )
    assert found[0] == found[1] and len(found[0]) == 6
    sheet = page_data(page)["layers"][0]["sheets"]["filters"]
    assert (tiles_of(page, sheet)[0] == forms[1][0]).all()


def test_large_tiles_are_reduced_and_small_ones_kept(tmp_path):
    layers = [
        GalleryLayer("large", "L", [GalleryMap(0, tones(9, 1, size=200)[..., :100], None)]),
        GalleryLayer("small", "S", [GalleryMap(0, tones(9, 1, size=3), None)]),
    ]
    page = write_gallery(tmp_path / "g", title="t", layers=layers)
    large, small = (layer["sheets"]["projections"] for layer in page_data(page)["layers"])
    assert (large["height"], large["width"]) == (84, 42)
    assert (small["height"], small["width"]) == (3, 3)


def test_maps_are_sorted_by_numbers_that_json_can_hold(page):
    layer = page_data(page)["layers"][0]
    assert [key["name"] for key in layer["sort"]] == ["strongest"]
    assert layer["sort"][0]["values"][:5] == [0, 1, 2, None, 4]


def test_numbers_are_shown_to_three_digits(tmp_path):
    given = {"a": 0.012345, "b": -1.5, "c": 12345.6, "d": 7, "e": np.float32(0.25), "f": "1.00"}
    layer = GalleryLayer("a", "A", [GalleryMap(0, tones(0), None, statistics=given)])
    page = write_gallery(tmp_path / "g", title="t", layers=[layer])
    data = page_data(page)["layers"][0]
    shown = dict(script_data(page, data["script"])[0]["statistics"])
    assert shown == {"a": "0.0123", "b": "−1.5", "c": "12346", "d": "7", "e": "0.25", "f": "1.00"}
    assert [key["name"] for key in data["sort"]] == ["a", "b", "c", "d", "e"]


def test_maps_are_read_one_at_a_time(tmp_path):
    earlier = []

    def maps():
        for number in range(4):
            # Of all maps before the last one nothing is held.
            assert all(tensor() is None for tensor in earlier[:-1])
            made = some_map(number)
            earlier.append(weakref.ref(made.projections))
            yield made
            del made

    def layers():
        for name in "ab":
            yield GalleryLayer(name, name, maps())
            # The layer is written before the next one is asked for.
            assert list(tmp_path.glob(f".deconvnet/g.new/layers/*-{name}/projections.png"))

    write_gallery(tmp_path / "g", title="t", layers=layers())
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
    shown = GalleryMap(0, tones(0, 1), tones(0, 1), [Caption(name, 1.0)])
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
    assert script_data(page, data["layers"][0]["script"])[0]["captions"][0][0].startswith(
        r"caf\xe9"
    )


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
        (one(GalleryMap(7, torch.rand(2, 8, 8), None)), r"7, projections: .*\(8, 8\); expected"),
        (one(GalleryMap(7, torch.zeros(2, 3, 4, 4).long(), None)), "7, projections: torch.int64"),
        (one(GalleryMap(7, tones(0) - 0.5, None)), r"7, projections: .*expected \[0, 1\]"),
        (one(GalleryMap(7, tones(0) * torch.nan, None)), "values from nan to nan"),
        (one(GalleryMap(7, tones(0), tones(0, 2))), "3 projections and 2 patches"),
        (one(GalleryMap(7, tones(0), None, [Caption("a", 1.0)])), "3 projections and 1 captions"),
        (one(GalleryMap(7, None, None, evolution=tones(0), epochs=(1,))), "3 pictures .* 1 epochs"),
        (one(GalleryMap(7, None, None, filter=torch.rand(3, 0, 4))), "no pixels"),
        (one(some_map(0), figures={"f": torch.rand(4, 5)}), "figure 'f'"),
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
        text = {"text": "\r"} if key == "Enter" else {}
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
    assert browser.value("document.querySelectorAll('.square')[1].children.length") == 3
    browser.click(".square button")
    browser.until("document.getElementById('zoom').open")
    assert "3.5 in a.png, row 1" in browser.value("document.getElementById('zoomed').textContent")
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
    assert browser.value("document.querySelector('.box').hidden")
    browser.value("document.querySelector('.seen .row a').focus()")
    top, height = browser.value(
        "(e => [e.style.top, e.style.height].map(parseFloat))(document.querySelector('.box'))"
    )
    assert (top, height) == pytest.approx((100 * 10 / 48, 100 * 8 / 48), abs=1e-3)
    # A map that this gallery does not have is named, and no link.
    text = browser.value("document.querySelector('.seen').textContent")
    assert "map 99" in text and not any("99" in link for link in browser.value(links))
    assert browser.value("document.querySelector('#view .notice')") is None
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
    assert browser.value("document.querySelectorAll('.strip li').length") == 2
    browser.press("Escape")
    browser.heading("Layer 2")
    # Focus is on the map that one comes from.
    assert browser.value("document.activeElement.dataset.map") == "4"
    browser.press("Escape")
    browser.until("!document.getElementById('overview').hidden")
    assert browser.value("document.activeElement.hash") == address(LAYERS[1])
    assert browser.problems() == []


def test_maps_are_sorted_searched_and_compared_with_the_control(browser, page):
    shown = "[...document.querySelectorAll('.grid a')].map(a => Number(a.dataset.map))"
    browser.show(page, address(LAYERS[0], sort="strongest", show="projections,control"))
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
        "(() => { const e = document.querySelector('[type=search]'); e.value = '1';"
        "e.dispatchEvent(new Event('input')) })()"
    )
    assert browser.value(shown) == [10, 1, 11]
    assert browser.problems() == []


def test_every_tile_on_the_screen_is_the_one_it_claims_to_be(browser, page):
    def near(color, number):
        return np.abs(color - tone(number)[:, 0, 0].numpy() * 255).max() <= 3

    browser.show(page)
    for n, k in ((1, 0), (5, 5), (11, 11)):  # of 12 maps one is dead
        assert near(browser.color(f".thumbnails li:nth-child({n}) .tile"), k), k
    browser.show(page, address(LAYERS[1]))
    for k in (0, 5, 8, 11):
        assert near(browser.color(f"[data-map='{k}'] .tile"), 20 + k), k
    browser.show(page, address(LAYERS[0], map=7))
    for n in range(3):
        assert near(browser.color(f".panel:nth-child(1) button:nth-child({n + 1}) .tile"), 7 + n)
        assert near(browser.color(f".panel:nth-child(2) button:nth-child({n + 1}) .tile"), 107 + n)
    browser.show(page, "#image=2")
    assert near(browser.color(".framed img"), 71)
    assert near(browser.color(".seen .row li:nth-child(2) .tile"), 2)


@pytest.mark.parametrize("width", [320, 360, 1400])
def test_nothing_is_wider_than_the_browser(browser, page, width):
    everything = "projections,patches,control,filters"
    places = ["", address(LAYERS[1], show=everything), address(LAYERS[1], map=4), "#image=1"]
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
    ):
        browser.show(page, place)
        assert text in browser.until("document.querySelector('#view .notice')?.textContent")
    assert browser.problems() == []
