"""The service in a real Chromium: every page, phone and desktop, dark and light; no foreign request, no markup."""

import os

import pytest
from eval_browser import chromium
from eval_runs import write_run
from eval_service_runs import app_on, serving, small_ladder

from infra import storage
from infra.results import ResultRow, ResultStore

XSS = "<img src=x onerror='document.title=1'>"
PAGES = ("", "losses", "losses?axis=compute", "scores", "samples", "few_steps", "scaling", "plans", "compare",
         "failures", "run?name=world-d2", "api")  # fmt: skip


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    root = str(tmp_path_factory.mktemp("browser") / "runs")
    small_ladder(root, (2, 3), checkpoints=2)
    uri = write_run(root, 4, name=XSS.replace("/", "") + " with a rather long name of no use", scored=False)
    metric = f"{XSS}/overall"
    ResultStore(uri + "/results").append([ResultRow("x", "h", XSS, 8, metric, 0.5, True, 2, "p", details=XSS)])
    no_text = storage.join(root, "bytes \udcff that are no text")  # a page that cannot link to it must not break
    os.makedirs(os.fsencode(no_text))
    ResultStore(no_text + "/results").append([ResultRow("x", "h", "v", 8, "val_loss/sd3", 0.5, False, 2, "p")])
    with serving(app_on(root)) as found:
        yield found


def settled(browser):
    browser.wait("document.body.dataset.page === 'api' || Number(document.body.dataset.drawn || 0) > 0")
    browser.wait("!document.querySelector('.fitting')")


@pytest.mark.timeout(300)
def test_every_page_on_a_phone_and_a_desktop(address):
    with chromium() as browser:
        grounds = set()
        for width, dark in ((1280, False), (390, True)):
            for page in PAGES:
                browser.open(f"{address}/{page}", width=width, dark=dark)
                settled(browser)
                assert [url for url in browser.requests if not url.startswith((address, "data:"))] == [], page
                assert browser.errors == [], page
                assert browser.js("document.documentElement.scrollWidth") <= width, page
                assert browser.js("document.title") != "1", page
                assert browser.js("document.querySelectorAll('img[onerror], main script').length") == 0, page
                assert not browser.js("document.querySelector('.box.bad')?.textContent"), page
                grounds.add(browser.js("getComputedStyle(document.body).backgroundColor"))
        assert len(grounds) == 2


@pytest.mark.timeout(300)
def test_charts_are_drawn_and_follow_the_choice_of_runs(address):
    with chromium() as browser:
        browser.open(f"{address}/losses")
        settled(browser)
        browser.wait("document.querySelectorAll('canvas').length === 2")
        painted = "(() => {const c = document.querySelector('canvas'); const d = c.getContext('2d').getImageData("
        painted += "0, 0, c.width, c.height).data; return d.some((v, i) => i % 4 === 3 && v > 0)})()"
        browser.wait(painted)
        assert browser.js("document.querySelectorAll('.legend button').length") >= 3
        browser.js("document.querySelector('details.chooser').open = true")
        browser.js("[...document.querySelectorAll('.chooser .list label')].find(l => l.title === 'world-d2').click()")
        browser.wait("document.querySelector('.chooser summary').textContent.includes('3 of 4')")
        browser.wait("![...document.querySelectorAll('.legend')][0].textContent.includes('world-d2')")
        assert "run=world-d3" in browser.js("location.search")
        browser.js("[...document.querySelectorAll('.segments button')].find(b => b.textContent === 'Compute').click()")
        browser.wait("location.search.includes('axis=compute')")
        assert browser.js("document.querySelector('nav a[href*=scores]').search.includes('world-d3')")
        browser.open(f"{address}/")
        settled(browser)
        browser.js("document.querySelectorAll('thead button')[2].click()")
        first = "document.querySelector('tbody td').textContent"
        ascending = browser.js(first)
        browser.js("document.querySelectorAll('thead button')[2].click()")
        assert browser.js(first) != ascending
        browser.js("[...document.querySelectorAll('tbody a')].find(a => a.textContent.includes('no text')).click()")
        browser.wait("document.querySelector('h1')?.textContent === 'bytes \\\\xff that are no text'")


@pytest.mark.timeout(300)
def test_pictures_are_shown_side_by_side_and_judged_blind(address):
    with chromium() as browser:
        browser.open(f"{address}/samples?run=world-d2&run=world-d3")
        settled(browser)
        browser.wait("document.images.length >= 5 && [...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert "<b>bold</b>" in browser.js("document.querySelector('ol.prompts').textContent")
        browser.open(f"{address}/compare", width=390)
        settled(browser)
        browser.js("document.querySelector('details').open = true")
        browser.js("document.querySelector('form.new input').value = 'first'")
        browser.js("document.querySelector('form.new button.main').click()")
        button = "[...document.querySelectorAll('button')].find(b => b.textContent === '{}')"
        browser.wait(f"!!{button.format('Judge')}")
        browser.js("document.querySelector('.controls input').value = 'Ann'")
        browser.js(f"{button.format('Judge')}.click()")
        for pair in range(4):
            browser.wait(f"document.querySelector('#content')?.textContent.includes('Pair {pair + 1} of 4')")
            browser.wait("[...document.querySelectorAll('.pair img')].every(i => i.complete && i.naturalWidth === 64)")
            assert "world-d" not in browser.js("document.querySelector('#content').innerHTML")
            assert browser.js("document.querySelector('button.main').disabled")
            browser.js("document.querySelectorAll('.question').forEach(q => q.querySelector('button').click())")
            browser.js("document.querySelector('button.main').click()")
        browser.wait("document.querySelector('#content').textContent.includes('all 4 pairs are answered')")
        browser.js(f"{button.format('Show results')}.click()")
        browser.wait("document.querySelector('#content').textContent.includes('world-d2 step 200')")
        assert browser.js("document.querySelectorAll('tbody tr').length") == 3
        assert browser.errors == []


@pytest.mark.timeout(300)
def test_a_pair_that_cannot_be_seen_cannot_be_judged(tmp_path):
    root = str(tmp_path / "runs")
    small_ladder(root, (2, 3), checkpoints=2)
    with serving(app_on(root)) as address, chromium() as browser:
        browser.open(f"{address}/compare")
        settled(browser)
        wanted = "{name: 'torn', run_a: 'world-d2', step_a: 200, run_b: 'world-d3', step_b: 200}"
        headers = "{'Content-Type': 'application/json'}"
        post = f"fetch('/api/human/studies', {{method: 'POST', headers: {headers}, body: JSON.stringify({wanted})}})"
        assert browser.js(f"{post}.then(answer => answer.status)") == 201
        storage.write_bytes(f"{root}/world-d3/gallery/step_0000200.png", b"torn")
        browser.open(f"{address}/compare?study=torn&rater=ann")
        browser.wait("document.querySelector('p.bad')?.textContent.includes('cannot be shown')")
        browser.js("document.querySelectorAll('.question').forEach(q => q.querySelector('button').click())")
        assert browser.js("document.querySelector('button.main').disabled")


@pytest.mark.timeout(300)
def test_numbers_in_words(address):
    with chromium() as browser:
        browser.open(address)
        settled(browser)
        shown = "import('/static/core.js').then(m => [{}].map(v => m.{}(v, 3)).join(' | '))"
        times = browser.js(shown.format("0, 0.00421, 0.0204, 0.9999, 3.21, 42, 754, 7300", "duration"))
        assert times == "0 s | 4.21 ms | 20.4 ms | 1 s | 3.2 s | 42 s | 12 min 34 s | 2 h 01 min"
        numbers = browser.js(shown.format("0, 0.5, 1, -0.0094, 1.2, 34.93, 2420.4, 123456", "steady"))
        assert numbers == "0.000 | 0.500 | 1.000 | -0.009 | 1.20 | 34.9 | 2420 | 123k"
