"""The demo page: its files; and in a real browser, on a real server, with the pocket model."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import sigma_book
from sigma_book.assemble import generate, load
from sigma_book.locate import parse
from sigma_book.processor import load_image
from sigma_book.why import explain
from sigma_book.world import caption, draw_scene, make_scene

STATIC = Path(sigma_book.__file__).parent / "static"
SCENES = json.loads((STATIC / "scenes.json").read_text())
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or "/usr/bin/chromium"
PATIENCE = 60_000  # milliseconds; everything here takes one or two seconds, on a busy machine many more

SERVER = """
import sys, torch
from sigma_book import load
from sigma_book.server import ServerConfig
from sigma_book.serving import serve
torch.set_num_threads(1)
model = load(device="cpu")
if "endless" in sys.argv:
    model.stop_ids = [model.config.text.vocab_size - 1]  # a token that is never said
config = ServerConfig("pocket", api_keys=("open-sesame",) if "locked" in sys.argv else ())
serve(lambda: model, config, port=0, explaining="mute" not in sys.argv)
"""


@pytest.fixture(scope="module")
def pocket():
    return load(device="cpu")


# ---- the files -------------------------------------------------------------------------------------------------------


def test_the_drawn_scenes_are_the_worlds(pocket):
    assert len(SCENES) == 6
    for row in SCENES:
        scene = make_scene(row["seed"])
        large = replace(
            scene, size=448, things=tuple(replace(t, box=tuple(4 * edge for edge in t.box)) for t in scene.things)
        )
        picture = load_image(STATIC / row["file"])
        assert picture.tobytes() == draw_scene(large).tobytes(), row["file"]
        assert row["shows"] == caption(scene)
        assert (STATIC / row["file"]).stat().st_size < 10_000


@pytest.mark.parametrize("row", SCENES, ids=lambda row: row["file"])
def test_the_pocket_model_answers_every_example(pocket, row):
    scene = make_scene(row["seed"])
    said = generate(load_image(STATIC / row["file"]), row["prompts"], model=pocket)
    for prompt, answer in zip(row["prompts"], said, strict=True):
        assert answer_fits(scene, prompt, answer), (prompt, answer)


def answer_fits(scene, prompt: str, answer: str) -> bool:
    """Whether an answer is right, told from the scene alone."""
    words = prompt.removeprefix("answer en ").rstrip("?").split()
    if words[0] == "caption":
        return answer == caption(scene)
    if words[0] == "detect":
        found, remarks = parse(answer, scene.size, scene.size)
        true = sorted(thing.box for thing in scene.things if thing.kind == " ".join(words[1:]))
        boxes = sorted(one.box for one in found)
        return (
            not remarks
            and len(boxes) == len(true)
            and all(
                max(abs(a - b) for a, b in zip(one, two, strict=True)) < 4 for one, two in zip(boxes, true, strict=True)
            )
        )
    if words[:2] == ["what", "colour"]:
        return answer == next(thing.colour for thing in scene.things if thing.shape == words[-1])
    if words[:2] == ["how", "many"]:
        noun = words[2:-2]
        single = noun[-1].removesuffix("es") if noun[-1] == "crosses" else noun[-1].removesuffix("s")
        colours = noun[:-1]
        return answer == str(
            sum(single in (t.shape, "shape") and all(t.colour == colour for colour in colours) for t in scene.things)
        )
    if words[:2] == ["is", "there"]:
        return answer == ("yes" if any(thing.kind == " ".join(words[3:]) for thing in scene.things) else "no")
    first, second = words[2], words[-1]
    left = {thing.shape: thing.box[1] for thing in scene.things}
    return answer == ("yes" if left[first] < left[second] else "no")


def test_the_page_needs_nothing_from_elsewhere():
    files = {
        path.name: path.read_text() for path in STATIC.iterdir() if path.suffix in (".html", ".js", ".css", ".svg")
    }
    assert set(files) == {"index.html", "app.js", "style.css", "icon.svg"}
    for name, text in files.items():
        text = text.replace("http://www.w3.org/2000/svg", "")  # the name of a namespace, which nobody fetches
        addresses = re.findall(r"(?:https?:)?//[\w.]+\.\w+", text)
        assert not addresses, (name, addresses)
    html = files["index.html"]
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", html), "nothing inline"
    assert "eval(" not in files["app.js"] and "innerHTML" not in files["app.js"]
    asked_for = set(re.findall(r'\$\("([\w-]+)"\)', files["app.js"]))
    assert asked_for <= set(re.findall(r'\bid="([\w-]+)"', html))
    for field in re.findall(r"<(?:input|textarea|select)\b[^>]*>", html):
        assert f'for="{re.search(r"id=.([a-z]+)", field)[1]}"' in html, field


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Start a server of some kind, once for all tests; gives its address."""
    running: dict[tuple[str, ...], tuple[subprocess.Popen, str]] = {}

    def start(*kind: str) -> str:
        if kind not in running:
            log = tmp_path_factory.mktemp("server") / "log"
            with log.open("w") as file:
                process = subprocess.Popen([sys.executable, "-c", SERVER, *kind], stderr=file, env=os.environ)
            running[kind] = (process, "")
            while not (lines := [json.loads(line) for line in log.read_text().splitlines() if '"url"' in line]):
                assert process.poll() is None, log.read_text()
            running[kind] = (process, lines[0]["url"])
        return running[kind][1]

    yield start
    for process, _ in running.values():
        process.terminate()
        process.wait(timeout=60)


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api")
    if not Path(BROWSER).exists():
        pytest.skip(f"needs Chromium as {BROWSER}")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium, start):
    """Open the page; at the end nothing must have been said on the console, and nothing asked of any other host."""
    contexts, complaints, allowed = [], [], []

    def open_page(*kind: str, width: int = 1200, height: int = 860, allow: str = "", **options):
        address = start(*kind)
        context = chromium.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        allowed.append(allow)

        def hear(text: str) -> None:
            if not (allow and re.search(allow, text)):
                complaints.append(text)

        page.on("console", lambda message: hear(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: hear(str(error)))
        page.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else hear(f"asked {r.url}"))
        page.goto(address)
        page.wait_for_selector('#scenes button[aria-pressed="true"]')
        page.wait_for_selector("#model:not(:empty), #error:not(:empty)", state="attached")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints


def wait_for_answer(page) -> str:
    """The whole answer, once its tokens can be pointed at."""
    page.wait_for_selector("#tokens button")
    return page.text_content("#answer")


def see(page, selector: str, text: str) -> None:
    """Wait until a text is there; in a script of the test's own the page's policy would forbid it."""
    page.wait_for_selector(f'{selector}:has-text("{text}")', state="attached")


def over(page, x: float, y: float, canvas: str = "#over") -> list[int]:
    """Red, green, blue, alpha of what lies over the picture, at a place from 0 to 1."""
    return page.evaluate(
        """([x, y, canvas]) => { const c = document.querySelector(canvas);
        return [...c.getContext('2d').getImageData(Math.min(c.width - 1, Math.floor(x * c.width)),
                Math.min(c.height - 1, Math.floor(y * c.height)), 1, 1).data]; }""",
        [x, y, canvas],
    )


def png(size=(300, 200), colour="white", mode="RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, "PNG")
    return file.getvalue()


def watch_bitmaps(page) -> None:
    """Keep the bitmaps that are made from now on, for `open_bitmaps`."""
    page.evaluate(
        """() => { window.bitmaps = []; const make = createImageBitmap;
        window.createImageBitmap = async (...given) => {
          const bitmap = await make(...given); window.bitmaps.push(bitmap); return bitmap; }; }"""
    )


def open_bitmaps(page) -> list[int]:
    """The widths of those that are not closed."""
    return page.evaluate("window.bitmaps.map((bitmap) => bitmap.width).filter(Boolean)")


@pytest.mark.browser
def test_ask_and_see_the_answer_come(open_page, pocket):
    page = open_page()
    page.click(f'#scenes button[data-file="{SCENES[1]["file"]}"]')
    page.wait_for_selector(f'#scenes button[data-file="{SCENES[1]["file"]}"][aria-pressed="true"]')
    page.evaluate(
        """() => { window.seen = []; window.spoken = []; const find = (id) => document.querySelector(id);
        const hear = (id, take) => new MutationObserver(() => take(find(id).textContent))
          .observe(find(id), {childList: true, characterData: true, subtree: true});
        hear('#answer', (text) => window.seen.push([text, find('#answer').getAttribute('aria-busy')]));
        hear('#spoken', (text) => window.spoken.push(text)); }"""
    )
    page.click('#examples button:text-is("caption en")')
    said = wait_for_answer(page)
    assert said == SCENES[1]["shows"]
    seen = page.evaluate("window.seen")
    lengths = [len(text) for text, _ in seen if text]
    assert lengths == sorted(lengths) and len(set(lengths)) >= 4, "it comes in pieces"
    assert {busy for text, busy in seen if text} == {"true"}
    assert page.get_attribute("#answer", "aria-busy") == "false"
    assert page.evaluate("window.spoken") == [said], "a screen reader hears it once, when it is whole"
    looks = explain(pocket, load_image(STATIC / SCENES[1]["file"]), "caption en", said)
    assert page.locator("#tokens button").all_text_contents() == [look.text.strip() for look in looks]


@pytest.mark.browser
def test_boxes_and_maps_are_drawn(open_page, pocket):
    page = open_page(allow="willReadFrequently")  # a remark about this test, which reads the canvas again and again
    page.click('#examples button:text-is("detect orange heart")')
    said = wait_for_answer(page)
    picture = load_image(STATIC / SCENES[0]["file"])
    (found,), _ = parse(said, 1, 1)
    item = page.locator("#boxes li")
    assert item.count() == 1 and "orange heart" in item.text_content()
    assert page.text_content("#spoken") == item.text_content(), "read out as words, not as loc tokens"
    assert item.locator("b").get_attribute("dir") == "auto", "a name in any script"
    shown = [float(item.get_attribute(f"data-{edge}")) for edge in ("top", "left", "bottom", "right")]
    assert shown == pytest.approx(found.box, abs=1e-3)
    page.mouse.move(5, 5)
    page.wait_for_selector('#over[data-shows="boxes"]', state="attached")
    top, left, bottom, right = found.box
    for x, y in ((left, (top + bottom) / 2), (right, (top + bottom) / 2), ((left + right) / 2, bottom)):
        assert over(page, x, y)[3] == 255, "the frame"
    assert over(page, (left + right) / 2, (top + bottom) / 2)[3] == 0, "nothing inside of it"
    assert over(page, 0.02, 0.02)[3] == 0

    looks = explain(pocket, picture, "detect orange heart", said)
    for index in (1, len(looks) - 1):
        page.locator("#tokens button").nth(index).hover()
        page.wait_for_selector('#over[data-shows="map"]', state="attached")
        weights = looks[index].weights
        veils = torch.tensor([[over(page, (c + 0.5) / 8, (r + 0.5) / 8)[3] for c in range(8)] for r in range(8)])
        wanted = 255 * 0.84 * (1 - weights / weights.max())
        assert (veils - wanted).abs().max() <= 3  # the browser stores whole numbers, and JSON six digits
        row, column = divmod(int(weights.argmax()), 8)
        assert f"row {row + 1}, column {column + 1} of 8" in page.text_content("#where")
    page.mouse.move(5, 5)
    page.wait_for_selector('#over[data-shows="boxes"]', state="attached")


@pytest.mark.browser
def test_without_a_mouse(open_page):
    page = open_page()

    def focused(what: str = "id") -> str:
        return page.evaluate(f"document.activeElement.{what} || ''")

    def tab_until(script: str, most: int = 40) -> None:
        for _ in range(most):
            page.keyboard.press("Tab")
            outline = page.evaluate(
                "(() => { const e = document.activeElement; const o = (n) => getComputedStyle(n).outlineStyle;"
                " return e.id === 'file' ? o(document.querySelector('label[for=file]')) : o(e); })()"
            )
            assert outline != "none", f"no visible focus on {focused('outerHTML')[:80]}"
            if page.evaluate(f"(() => {{ const e = document.activeElement; return {script}; }})()"):
                return
        raise AssertionError(f"Tab never came to {script}")

    tab_until("e.closest('#scenes') && e.dataset.file === '" + SCENES[2]["file"] + "'")
    page.keyboard.press("Enter")
    page.wait_for_selector(f'#scenes button[data-file="{SCENES[2]["file"]}"][aria-pressed="true"]')
    tab_until("e.id === 'prompt'")
    page.keyboard.press("Control+A")
    page.keyboard.type("answer en what colour is the heart?")
    page.keyboard.press("Enter")
    assert wait_for_answer(page) == "yellow"
    page.keyboard.press("Control+A")
    page.keyboard.type("caption en")
    page.keyboard.press("Enter")
    page.wait_for_selector("#tokens button >> nth=5")
    tab_until("e.closest('#tokens')")
    page.wait_for_selector('#over[data-shows="map"]', state="attached")
    first = page.text_content("#where")
    page.keyboard.press("ArrowRight")
    assert page.text_content("#where") != first and focused("textContent") == "yellow"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"
    page.keyboard.press("Shift+Tab")
    assert page.text_content("#where") == first, "the word before it, while it has the focus"
    page.keyboard.press("Shift+Tab")
    assert "yellow" in page.text_content("#where"), "pressed: its map is there again"
    page.keyboard.press("Escape")
    assert page.text_content("#where") == "" and page.get_attribute("#over", "data-shows") == "nothing"


@pytest.mark.browser
def test_own_pictures(open_page, tmp_path):
    page = open_page()
    encoded = base64.b64encode(png()).decode()
    give = """([encoded, kind]) => { const data = new DataTransfer();
      data.items.add(new File([Uint8Array.from(atob(encoded), (c) => c.charCodeAt(0))], 'mine.png', {type: 'image/png'}));
      const event = kind === 'drop' ? new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true})
                                    : new ClipboardEvent('paste', {clipboardData: data, bubbles: true});
      document.querySelector(kind === 'drop' ? '#stage' : 'body').dispatchEvent(event); }"""
    watch_bitmaps(page)
    for kind in ("drop", "paste"):
        page.click("#scenes button >> nth=3")
        see(page, "#shown", "green triangle")
        page.evaluate(f"(given) => {{ ({give})(given); ({give})(given); }}", [encoded, kind])
        see(page, "#shown", "mine.png, 300 × 200")
    assert open_bitmaps(page) == [300], "neither those before, nor the one that came too late"
    wide = page.evaluate("(() => { const c = document.querySelector('#picture'); return c.width / c.height; })()")
    assert wide == pytest.approx(1.5, abs=0.01), "its proportions are kept"
    (tmp_path / "chosen.png").write_bytes(png(colour=(255, 0, 0, 0), mode="RGBA"))
    page.set_input_files("#file", tmp_path / "chosen.png")
    see(page, "#shown", "chosen.png")
    assert over(page, 0.5, 0.5, "#picture") == [255, 255, 255, 255], "transparent is white, in the dark too"
    page.click("#send")
    wait_for_answer(page)


@pytest.mark.browser
def test_text_goes_into_the_prompt(open_page):
    page = open_page()
    give = """([kind, text, name]) => { const data = new DataTransfer();
      if (text) data.setData('text/plain', text);
      if (name.endsWith('cells.png')) data.setData('text/html', `<td>${text}</td>`);
      if (name) data.items.add(new File([Uint8Array.from(atob('%s'), (c) => c.charCodeAt(0))], name, {type: 'image/png'}));
      const more = {bubbles: true, cancelable: true};
      const event = kind === 'paste' ? new ClipboardEvent(kind, {clipboardData: data, ...more})
                                     : new DragEvent(kind, {dataTransfer: data, ...more});
      return document.querySelector('#prompt').dispatchEvent(event); }"""
    give %= base64.b64encode(png()).decode()
    assert page.evaluate(give, ["dragover", "red star", ""]) and page.evaluate(give, ["drop", "red star", ""])
    assert page.evaluate(give, ["paste", "red star", "cells.png"]), "Excel gives both"
    page.wait_for_timeout(200)
    assert page.text_content("#error") == "" and SCENES[0]["shows"] in page.text_content("#shown")
    for kind in ("paste", "drop"):
        page.evaluate(give, [kind, "", f"{kind}.png"])
        see(page, "#shown", f"{kind}.png")
    page.evaluate(give, ["paste", "copied.png", "copied.png"])  # as file managers do
    see(page, "#shown", "copied.png")


@pytest.mark.browser
def test_what_comes_late_or_is_no_picture_changes_nothing(open_page):
    page = open_page()
    late: list = []

    def hold(route) -> None:
        """Hold the first; those behind it pass."""
        late.append(route) if not late else route.continue_()

    page.route(f"**/{SCENES[1]['file']}", hold)
    page.click("#scenes button >> nth=1")
    page.click('#examples button:text-is("caption en")')
    see(page, "#error", "still on its way")
    page.click("#scenes button >> nth=2")
    see(page, "#shown", SCENES[2]["shows"])
    page.click('#examples button:text-is("caption en")')
    said = wait_for_answer(page)
    with page.expect_response(f"**/{SCENES[1]['file']}"):
        late.pop().continue_()
    page.set_input_files("#file", {"name": "a.txt", "mimeType": "text/plain", "buffer": b"hi"})
    see(page, "#error", "a.txt")
    assert SCENES[2]["shows"] in page.text_content("#shown")
    assert page.text_content("#answer") == said and page.is_visible("#tokens button >> nth=1")

    page.route("**/explain", hold)
    page.click("#send")
    see(page, "#note", "Looking")
    with page.expect_event("requestfailed", lambda request: request.url.endswith("explain")):
        page.click("#send")
    assert wait_for_answer(page) == said
    assert page.text_content("#note") == page.text_content("#error") == ""

    late.clear()
    page.click("#send")
    see(page, "#note", "Looking")
    with page.expect_event("requestfailed", lambda request: request.url.endswith("explain")):
        page.click("#stop")
    see(page, "#note", "Stopped.")
    assert page.text_content("#answer") == said and page.is_disabled("#stop") and page.is_hidden("#why")


@pytest.mark.browser
def test_the_focus_stays(open_page):
    page = open_page()
    page.fill("#prompt", "detect orange heart")
    for button in ("send", "stop"):
        page.focus("#send")
        page.keyboard.press("Enter")
        page.focus(f"#{button}")
        wait_for_answer(page)
        assert page.evaluate("document.activeElement.id") == button
        assert page.get_attribute("#send", "aria-disabled") == "false"
    page.locator("#tokens button").nth(2).focus()
    where = page.text_content("#where")
    assert where.startswith("“bottom ") and "loc" not in where
    page.locator("#tokens button").nth(4).hover()
    assert page.text_content("#where") != where
    page.mouse.move(5, 5)
    assert page.text_content("#where") == where, "the word that the keyboard is on"


@pytest.mark.browser
def test_a_large_photo_is_sent_smaller(open_page, tmp_path):
    page = open_page()
    photo = tmp_path / "photo.jpg"
    Image.effect_noise((4500, 3000), 80).convert("RGB").save(photo, quality=90)
    assert photo.stat().st_size > 4e6
    watch_bitmaps(page)
    page.set_input_files("#file", photo)
    see(page, "#shown", "4500 × 3000 pixels, sent as a copy of at most 1792 pixels")
    assert open_bitmaps(page) == [1792]
    with page.expect_request("**/v1/chat/completions") as asked:
        page.click("#send")
    url = asked.value.post_data_json["messages"][0]["content"][0]["image_url"]["url"]
    sent = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert sent.size == (1792, 1195) and len(url) < 5e6
    assert "max_tokens" not in asked.value.post_data_json, "how many tokens are allowed, the server knows"
    wait_for_answer(page)


@pytest.mark.browser
def test_what_goes_wrong_is_a_sentence(open_page, tmp_path):
    page = open_page(allow="status of 4(00|29)")
    alert = page.get_by_role("alert")
    (tmp_path / "broken.png").write_bytes(png()[:40])
    page.set_input_files("#file", tmp_path / "broken.png")
    page.wait_for_selector("#error:not(:empty)")
    assert "broken.png" in alert.text_content() and "not a picture" in alert.text_content()
    page.fill("#prompt", "  ")
    page.click("#send")
    assert "prompt is empty" in alert.text_content()
    page.fill("#prompt", "caption <image>")
    page.click("#send")
    see(page, "#error", "<image>")
    page.fill("#prompt", "star " * 3000)
    page.click("#send")
    see(page, "#error", "context")
    page.click("summary")
    page.fill("#prompt", "caption en")
    page.fill("#most", "0")
    page.click("#send")
    assert "whole number" in alert.text_content()
    page.fill("#most", "2")
    busy = {"error": {"message": "1 request is under way: ask again in 1 s"}}
    page.route(
        "**/completions", lambda route: route.fulfill(status=429, json=busy, headers={"Retry-After": "1"}), times=1
    )
    page.click("#send")
    see(page, "#error", "request")
    assert alert.text_content() == busy["error"]["message"]
    page.click("#send")
    wait_for_answer(page)
    assert alert.text_content() == "" and "Cut at 2 tokens" in page.text_content("#note")


@pytest.mark.browser
def test_stop(open_page):
    page = open_page("endless", allow="ERR_ABORTED")
    explained: list = []
    page.on("request", lambda request: explained.append(request) if request.url.endswith("explain") else None)
    page.click("summary")
    page.fill("#most", "1000")
    page.click("#send")
    page.wait_for_selector("#answer:has-text('e')")
    assert page.is_disabled("#send")
    page.click("#stop")
    see(page, "#note", "Stopped.")
    length = len(page.text_content("#answer"))
    page.wait_for_timeout(300)
    assert len(page.text_content("#answer")) == length and page.is_disabled("#stop")
    assert not explained and page.evaluate("document.activeElement.id") == "stop"
    page.click("#scenes button >> nth=1")
    page.wait_for_selector("#answer:empty", state="attached")


@pytest.mark.browser
def test_a_server_that_wants_a_key(open_page):
    page = open_page("locked", allow="status of 401")
    assert page.get_by_role("alert").text_content().endswith("Bearer KEY. Enter a key under Settings.")
    page.fill("#key", "schlüssel€")
    page.click("#send")
    see(page, "#error", "a sign that no key has")
    page.fill("#key", "open-sesame")
    page.click("#send")
    wait_for_answer(page)
    assert page.get_by_role("alert").text_content() == "" and "pocket" in page.text_content("#model")


@pytest.mark.browser
def test_a_server_that_does_not_explain(open_page):
    page = open_page("mute", allow="status of 404")
    asked: list = []
    page.on("request", lambda request: asked.append(request.url.rpartition("/")[2]))
    for _ in range(2):
        page.click("#send")
        see(page, "#note", "does not explain")
        assert page.text_content("#answer") == SCENES[0]["shows"] and page.is_hidden("#why")
    assert asked.count("completions") == 2 and asked.count("explain") == 1


@pytest.mark.browser
def test_from_right_to_left(open_page):
    page = open_page()
    words = ["نجمة", " حمراء", " كبيرة"]
    part = {"choices": [{"delta": {"content": "".join(words)}, "finish_reason": "stop"}]}
    page.route("**/completions", lambda route: route.fulfill(body=f"data: {json.dumps(part)}\n\n"))
    looks = [{"text": word, "weights": [[0.25, 0.75]] * 2} for word in words]
    page.route("**/explain", lambda route: route.fulfill(json={"tokens": looks}))
    page.fill("#prompt", "صف الصورة")
    page.click("#send")
    assert wait_for_answer(page) == "".join(words)
    for field in ("prompt", "answer", "tokens"):
        assert page.evaluate(f"getComputedStyle(document.getElementById('{field}')).direction") == "rtl", field
    page.locator("#tokens button").first.focus()
    for key, word in (("ArrowLeft", words[1]), ("ArrowRight", words[0]), ("Control+ArrowLeft", words[0])):
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.textContent") == word.strip(), key


@pytest.mark.browser
def test_a_phone(open_page):
    page = open_page(width=360, height=740, has_touch=True, is_mobile=True, device_scale_factor=2)
    for prompt in (None, "detect orange heart", "caption en"):
        if prompt:
            page.tap(f'#examples button:text-is("{prompt}")')
            wait_for_answer(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.locator("#tokens button").nth(2).tap()
    page.wait_for_selector('#over[data-shows="map"]', state="attached")
    place = page.locator("#over").bounding_box()
    assert place["y"] >= 0 and place["y"] + place["height"] <= 740, "picture and word are seen together"
    page.locator("#tokens button").nth(2).tap()
    page.wait_for_selector('#over[data-shows="nothing"]', state="attached")
    asks = {"autocapitalize": "none", "autocorrect": "off", "enterkeyhint": "send"}
    assert {name: page.get_attribute("#prompt", name) for name in asks} == asks, "typed as it is meant"
    small = page.evaluate(
        "[...document.querySelectorAll('button, .button, input:not(.file)')].filter((e) => e.checkVisibility() && "
        "(e.getBoundingClientRect().height < 24 || e.getBoundingClientRect().width < 24)).map((e) => e.outerHTML)"
    )
    assert not small, "too small for a finger"


CONTRAST = """() => {
  const parts = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (e) => { for (; e; e = e.parentElement) { const c = parts(getComputedStyle(e).backgroundColor);
    if (c.length === 3 || c[3] === 1) return c; } return [255, 255, 255]; };
  const low = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()) || e.tagName === 'INPUT';
    if (!own || !e.checkVisibility() || e.disabled) continue;
    const [a, b] = [light(parts(getComputedStyle(e).color)), light(ground(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push([e.outerHTML.slice(0, 90), ratio]);
  }
  return low; }"""


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(open_page, scheme, tmp_path):
    page = open_page(color_scheme=scheme, reduced_motion="reduce")
    page.click("summary")
    page.click('#examples button:text-is("detect orange heart")')
    wait_for_answer(page)
    page.locator("#tokens button").nth(5).click()
    assert page.evaluate(CONTRAST) == []
    (tmp_path / "broken.png").write_bytes(b"x")
    page.set_input_files("#file", tmp_path / "broken.png")
    page.wait_for_selector("#error:not(:empty)")
    assert page.evaluate(CONTRAST) == []
    moving = page.evaluate(
        "[...document.querySelectorAll('*')].filter((e) => getComputedStyle(e).transitionDuration !== '0s')"
    )
    assert moving == []
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper)[:3])) > 400) == (scheme == "light")


@pytest.mark.browser
def test_the_accessibility_tree(open_page):
    page = open_page()
    page.click('#examples button:text-is("caption en")')
    wait_for_answer(page)
    page.click("summary")
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    nodes = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree if not node["ignored"]]
    wanted = (
        "button",
        "textbox",
        "spinbutton",
        "link",
        "img",
        "image",
        "list",
        "group",
        "heading",
        "DisclosureTriangle",
    )
    nameless = [node for node in nodes if node[0] in wanted and not node[1].strip()]
    assert not [node for node in nameless if node[0] != "group"], nameless
    names = {name for _, name in nodes}
    for name in (
        "Prompt",
        "Ask",
        "Stop",
        "Most tokens",
        "Temperature",
        "API key",
        "Example prompts",
        "Words of the answer",
    ):
        assert name in names, name
    assert f"Drawn scene: {SCENES[0]['shows']}" in names and f"Scene: {SCENES[3]['shows']}" in names
    roles = [role for role, _ in nodes]
    assert roles.count("main") == 1 and "banner" in roles and "contentinfo" in roles
    levels = [
        next(p["value"]["value"] for p in node["properties"] if p["name"] == "level")
        for node in tree
        if not node["ignored"] and node["role"]["value"] == "heading"
    ]
    assert levels[0] == 1 and levels.count(1) == 1 and max(levels) <= 3
    assert page.get_attribute("#spoken", "role") == "status" and page.get_attribute("html", "lang") == "en"
    assert page.get_attribute("#answer", "aria-live") is None
    assert nodes.count(("StaticText", SCENES[0]["shows"])) == 2, "the answer, and what is unseen but spoken"
