"""The four uses of the judge on a few rows each: `python examples/uses.py`.

The embedded model is small, and often wrong. Name another with `ModelSpec`.
"""

from alpaca_core import LanguageModel, ModelSpec, RowError, classify, is_outlier, load_model, rate, same_meaning


def sort_messages(model: LanguageModel) -> None:
    """Give each message to a bank one of its categories."""
    messages = [
        "My new card still has not come in the mail.",
        "How many euros do I get for a dollar?",
        "Somebody took my wallet with the card in it.",
    ]
    categories = ["card delivery", "lost or stolen card", "exchange rate", "top up"]
    for row in classify(model, messages, categories):
        if isinstance(row, RowError):
            print(f"  failed: {row.message}")
        elif row.label is not None:  # None where no category had any probability
            print(f"  {row.probabilities[row.label]:.2f} {row.label}: {row.text}")


def compare_headlines(model: LanguageModel) -> None:
    """Say how probably two headlines tell the same."""
    firsts = ["The match was called off because of rain.", "The match was called off because of rain."]
    seconds = ["Rain forced the organisers to cancel the match.", "The match ended in a draw."]
    for first, second, row in zip(firsts, seconds, same_meaning(model, firsts, seconds), strict=True):
        if isinstance(row, RowError):
            print(f"  failed: {row.message}")
        else:
            print(f"  {row.probabilities['Yes']:.2f} {first} / {second}")


def find_strangers(model: LanguageModel) -> None:
    """Find what is no restaurant review, the likeliest first."""
    reviews = [
        "Great pizza, friendly staff, we will be back.",
        "We waited an hour for a burger that was burnt.",
        "Small portions, but every dish was a delight.",
    ]
    texts = ["The soup was cold and the waiter rude.", "Restart the router, then hold the button for ten seconds."]
    rows = [row for row in is_outlier(model, texts, reviews) if not isinstance(row, RowError)]
    for row in sorted(rows, key=lambda row: row.p_outlier or 0.0, reverse=True):
        print(f"  {row.p_outlier or 0.0:.2f} {row.text}")


def rate_sentences(model: LanguageModel) -> None:
    """Rate sentences from 1 to 5, and show how the model spreads over the scale."""
    sentences = ["The alpaca, wary at first, ate from the child's open hand.", "Alpaca it hand of child did eaten was."]
    for row in rate(model, sentences, "How fluent is this text?"):
        if isinstance(row, RowError):
            print(f"  failed: {row.message}")
        elif row.score is not None:
            shares = " ".join(f"{step}:{share:.2f}" for step, share in row.distribution.items())
            print(f"  {row.score:.2f} ({shares}) {row.text}")


def main() -> None:
    """Load the model once, and use it four times."""
    with load_model(ModelSpec()) as model:
        for use in (sort_messages, compare_headlines, find_strangers, rate_sentences):
            print(use.__doc__)
            use(model)
            print()


if __name__ == "__main__":
    main()
