"""What a run leaves for people: any text shows as itself, and nothing of it becomes markup."""

import re
from html.parser import HTMLParser

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from prefect_alpaca.flows import report
from prefect_alpaca.flows.terminal import printable

MARKUP = "\\`*_{}[]()<>#+-.!|~=:&\"'/ \n\t1a"
TEXTS = st.one_of(st.text(max_size=40), st.text(alphabet=MARKUP, max_size=40))
RENDER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])


class Page(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, markdown: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(RENDER.render(markdown))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not attrs, (tag, attrs)
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def shown(text: str) -> str:
    return " ".join(printable(text).split())


@given(TEXTS)
@example("<script>alert(1)</script>")
@example("![](https://example.org/x.png) [a](javascript:b) | # &lt; `c` ~~d~~ 1. e")
@example("\x1b[31m\u202e\ud800\x00")
def test_any_text_on_one_line_is_shown_as_itself(text: str) -> None:
    page = Page(report.inline(text))
    if shown(text):
        assert page.tags == ["p"]
        assert page.text.strip() == shown(text)
    else:
        assert page.tags == ["p", "em"]


@given(st.lists(TEXTS, min_size=2, max_size=2))
@example(["a | b", "c\n\nd"])
def test_any_text_stays_in_its_cell(texts: list[str]) -> None:
    page = Page(report.table(["x", "y"], [[report.inline(text) for text in texts]]))
    assert [tag for tag in page.tags if tag != "em"] == ["table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td"]


@given(TEXTS.filter(lambda text: shown(text) != ""))
@example("> a\n\n```\nb\n---")
def test_any_text_stays_in_its_quotation(text: str) -> None:
    page = Page(f"{report.quote(text)}\n\nafter")
    assert page.tags[0] == "blockquote"
    assert set(page.tags) == {"blockquote", "p"}
    assert re.sub(r"\s+", " ", page.text).strip() == f"{shown(text)} after"


@given(TEXTS, TEXTS)
def test_a_heading_is_one_line(title: str, other: str) -> None:
    page = Page(report.sections([(title, "body"), (other, "body")]))
    assert [tag for tag in page.tags if tag != "em"] == ["h3", "p", "hr", "h3", "p"]


def test_long_texts_and_many_rows_are_cut_and_said_to_be() -> None:
    assert len(report.inline("x" * 10**7)) == report.MOST_CHARACTERS + 2
    assert len(report.cell("x" * 10**7)) == report.MOST_CELL_CHARACTERS + 2
    page = report.table(["n"], [[str(number)] for number in range(250)])
    assert page.endswith("*and 150 more, in the run's result*")
    assert report.sections([("title", "body")] * 101).endswith("*and 1 more, in the run's result*")


@pytest.mark.parametrize("share", [0.0, 0.04, 0.5, 0.96, 1.0])
def test_a_bar_has_ten_places(share: float) -> None:
    drawn, number = report.bar(share).split()
    assert len(drawn) == 10
    assert drawn.count("▰") == round(10 * share)
    assert float(number) == pytest.approx(share, abs=0.005)
