"""Watch the news: topic and sentiment of each text, and an alarm when bad news increases. Takes 4 seconds.

The labels are chosen by similarity. The sentences of the first two days are examples of the sentiments; the
topics need none. An alarm: the share of bad news is above the average of the days before by --rise. The
figures at the end are those of the days without examples.
"""

import argparse
import json
from pathlib import Path

from minilm.prompting import EmbeddingClassifier

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="all-MiniLM-L6-v2")
parser.add_argument("--file", default=str(Path(__file__).parent / "data" / "news.jsonl"))
parser.add_argument("--rise", type=float, default=0.25)
arguments = parser.parse_args()

news = [json.loads(line) for line in Path(arguments.file).read_text(encoding="utf-8").splitlines()]
examples = [(row["text"], row["sentiment"]) for row in news if row["day"] <= 2]
sentiments = EmbeddingClassifier(
    arguments.model, {"positive": "good news", "negative": "bad news"}, examples=examples
)
topics = EmbeddingClassifier(
    sentiments.encoder, ["sport", "politics", "business", "weather"], hypothesis="This is about {}."
)
texts = [row["text"] for row in news]
found = list(zip(news, sentiments.predict(texts), topics.predict(texts), strict=True))

shares: list[float] = []
for day in sorted({row["day"] for row in news}):
    today = [(topic, mood) for row, mood, topic in found if row["day"] == day]
    bad = [topic for topic, mood in today if mood == "negative"]
    share = len(bad) / len(today)
    alarm = bool(shares) and share > sum(shares) / len(shares) + arguments.rise
    shares.append(share)
    often = f"  ALARM, mostly {max(bad, key=bad.count)}" if alarm else ""
    print(f"day {day}  {'█' * round(20 * share):<20} {share:4.0%} bad{often}")

test = [one for one in found if one[0]["day"] > 2]
for name, place in (("sentiment", 1), ("topic", 2)):
    right = sum(one[place] == one[0][name] for one in test)
    print(f"{name}: {right} of {len(test)} are right")
