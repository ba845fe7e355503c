"""The page of `nds serve`: nothing from elsewhere, and in a real browser it shows what the API tells."""

import re

import httpx
import pytest

from nemotron_dspark.config.run import DraftSection, ServeConfig
from nemotron_dspark.drafts.config import build_draft_config
from nemotron_dspark.drafts.dspark import DSparkDraft
from nemotron_dspark.serving.listen import Server
from tests.serving import chromium

needs_browser = pytest.mark.skipif(
    chromium.executable() is None, reason="no Chromium in PATH; `apt-get install chromium` would run it"
)
QUESTION = "What <b>is</b> a state?"


@pytest.fixture(scope="module")
def server(target):
    section = DraftSection(num_layers=1, block_size=4, taps=[0, 1], markov_rank=8)
    draft = DSparkDraft(build_draft_config(target.spec, section, mask_token_id=5)[0], seed=0)
    draft.set_embeddings(target.model.get_input_embeddings().weight, target.head.weight)
    with Server(target, draft, ServeConfig(port=0)) as running:
        yield running


@pytest.mark.parametrize("path", ["/", "/page.css", "/page.js"])
def test_the_page_needs_nothing_from_elsewhere_and_runs_nothing_inline(server, path):
    answer = httpx.get(server.url + path)
    assert answer.status_code == 200
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert "unsafe" not in answer.headers["Content-Security-Policy"]
    assert not re.search(r"https?://|@import|innerHTML|<script>|\son\w+=|style=", answer.text)


def test_the_page_is_in_the_package(server):
    from nemotron_dspark.serving import guard
    from nemotron_dspark.serving import server as module

    files = {path.name for path in (module.Path(module.__file__).parent / "page").iterdir()}
    assert files == set(guard.PAGE.values())


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = chromium.Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture
def page(browser, server):
    browser.errors.clear()
    browser.look()
    browser.open(server.url + "/")
    browser.until("document.getElementById('status').textContent.includes('proposes 4')")
    browser.value("document.getElementById('max_tokens').value = 40, 1")
    yield browser
    assert browser.errors == []
    origins = "[...new Set(performance.getEntriesByType('resource').map(e => new URL(e.name).origin))]"
    assert browser.value(origins) == [server.url]


def ask(page):
    page.value("document.getElementById('prompt').focus(), 1")
    page.write(QUESTION)
    page.press("Enter")
    page.until("document.querySelector('.token[data-round]') && !document.getElementById('send').disabled")


def told(server, **more):
    """What the API tells of the same answer."""
    body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 40, **more}
    answer = httpx.post(server.base_url + "/chat/completions", json=body | {"return_rounds": True}, timeout=60).json()
    return answer["choices"][0]["rounds"], answer["usage"]


TOKENS = "[...document.querySelectorAll('.answer .token')].map(e => [e.textContent, e.classList[1], +e.dataset.round])"


@needs_browser
def test_every_token_is_coloured_by_who_made_it(page, server):
    ask(page)
    rounds, usage = told(server)
    expected = [
        ["■" if text is None else text, "draft" if place < each["kept"] else "target", number]
        for number, each in enumerate(rounds)
        for place, text in enumerate(each["tokens"])
    ]
    assert page.value(TOKENS) == expected
    assert {kind for _, kind, _ in expected} == {"draft", "target"}
    assert page.value("document.querySelector('.question').textContent") == QUESTION  # text, not elements
    assert page.value("document.querySelector('.rounds').textContent") == str(len(rounds) - 1)
    length = float(page.value("document.querySelector('.length').textContent"))
    assert length == pytest.approx(usage["speculative"]["accepted_length"], abs=0.006)
    assert float(page.value("document.querySelector('.speed').textContent")) > 0


@needs_browser
def test_rounds_are_stepped_through_with_the_keyboard(page, server):
    ask(page)
    rounds, _ = told(server)
    page.value("document.querySelector('.answer').focus(), 1")
    which = "document.querySelector('.which').textContent"
    last = len(rounds) - 1
    steps = [("ArrowRight", 0), ("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", last)]
    steps += [("ArrowRight", last), ("Home", 0), ("ArrowLeft", 0), ("ArrowRight", 1)]
    for key, number in steps:
        page.press(key)
        assert page.value(which) == f"round {number} of {last}"
        chosen = page.value("document.querySelectorAll('.chosen').length")
        assert chosen == len(rounds[number]["tokens"])
    refused = page.value("[...document.querySelectorAll('.round .refused')].map(e => e.textContent)")
    assert refused == [text.replace("\n", "↵") or "…" for text in rounds[1]["refused"]]
    assert f"kept {rounds[1]['kept']}" in page.value("document.querySelector('.round').textContent")


@needs_browser
def test_with_and_without_the_draft_stand_side_by_side(page, server):
    page.value("document.querySelector('[value=both]').click(), 1")
    ask(page)
    page.until("document.querySelector('.verdict').textContent")
    assert "the texts are the same" in page.value("document.querySelector('.verdict').textContent")
    tops = page.value("[...document.querySelectorAll('.pane')].map(e => e.getBoundingClientRect().top)")
    assert len(tops) == 2
    assert tops[0] == tops[1]
    assert page.value("document.querySelectorAll('.pane:last-child .draft').length") == 0
    page.look(width=360, height=700)  # on a narrow screen one below the other, and nothing sticks out
    tops = page.value("[...document.querySelectorAll('.pane')].map(e => e.getBoundingClientRect().top)")
    assert tops[0] < tops[1]
    right = "Math.max(...[...document.querySelectorAll('body *')].map(e => e.getBoundingClientRect().right))"
    page.value("document.querySelector('.answer').focus(), 1")
    for _ in range(8):
        page.press("ArrowRight")
        assert page.value(right) <= 360
    assert page.value("document.documentElement.scrollWidth") <= 360


CONTRAST = """(() => {
  const light = (text) => {
    const parts = text.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255);
    const [r, g, b] = parts.map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (e) => {
    const own = getComputedStyle(e).backgroundColor;
    return own === "rgba(0, 0, 0, 0)" ? behind(e.parentElement) : own;
  };
  return [...document.querySelectorAll("h1, h2, .token, dt, dd, #hint, #send, #clear, #status, summary")].map((e) => {
    const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), e.className || e.id || e.tagName];
  });
})()"""


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_everything_is_readable_in_the_dark_and_in_the_light(page, dark):
    page.look(dark=dark)
    ask(page)
    paper = page.value("getComputedStyle(document.body).backgroundColor")
    assert min(page.value(CONTRAST)) >= [4.5]  # WCAG AA
    page.value("document.getElementById('theme').click(), 1")
    assert page.value("getComputedStyle(document.body).backgroundColor") != paper
    assert min(page.value(CONTRAST)) >= [4.5]


@needs_browser
def test_the_page_asks_for_the_key_and_uses_it(browser, target):
    browser.look()
    with Server(target, config=ServeConfig(port=0), api_key="sesame") as locked:
        browser.open(locked.url + "/")
        browser.until("!document.getElementById('unlock').hidden")
        browser.value("document.getElementById('key').focus(), 1")
        browser.write("sesame")
        browser.press("Enter")
        browser.until("document.getElementById('status').textContent.includes('no draft')")
        assert browser.value("document.getElementById('unlock').hidden")
        browser.value("document.getElementById('max_tokens').value = 5, 1")
        ask(browser)
        assert browser.value("document.querySelectorAll('.answer .token').length") == 5
