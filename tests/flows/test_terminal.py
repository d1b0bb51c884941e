"""What a terminal says below its rows."""

from alpaca_core import Outlier, RowError
from prefect_alpaca.flows import terminal


def test_a_note_names_the_first_rows_and_counts_the_others() -> None:
    plain, escaped = (Outlier(text="x", p_outlier=None, coverage=0.0, escaped=each) for each in (False, True))
    failed = RowError(code="empty_text", message="x")
    assert terminal.escape_note([]) == terminal.escape_note([plain, failed]) == ""
    assert terminal.escape_note([failed, escaped, plain, escaped]).endswith(": rows 2, 4")
    assert terminal.escape_note([escaped] * 1012).endswith(": rows 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 1,002 more")
