"""The report in a real Chromium: no request leaves the page, nothing overflows a phone, dark and light differ."""

import pytest
from eval_browser import chromium
from eval_runs import write_ladder

from eval.report.build import write_report


@pytest.mark.timeout(300)
def test_the_report_in_a_browser(tmp_path):
    write_ladder(str(tmp_path / "runs"), (2, 3), checkpoints=1)
    page = write_report(str(tmp_path / "runs"), str(tmp_path / "out"))
    with chromium() as browser:
        grounds = []
        for width, dark in ((1280, False), (390, True)):
            browser.open(page.as_uri(), width=width, dark=dark)
            assert [url for url in browser.requests if not url.startswith(("file:", "data:"))] == []
            assert browser.errors == []
            assert browser.js("document.documentElement.scrollWidth") <= width
            grounds.append(browser.js("getComputedStyle(document.body).backgroundColor"))
            shown = "wide" if width > 640 else "narrow"
            boxes = "[...document.querySelectorAll('figure svg')].filter(s => s.getBoundingClientRect().height > 40)"
            assert browser.js(f"{boxes}.every(s => s.parentElement.className === '{shown}')")
            assert browser.js(f"{boxes}.length") >= 4
            assert browser.js("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
            assert browser.js("document.images.length") >= 2
        assert grounds[0] != grounds[1]
