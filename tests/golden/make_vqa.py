"""Makes vqa.json.gz: 2,000 question-answer sets with the scores of the official VQA script.

    git clone https://github.com/GT-Vision-Lab/VQA     # commit a013f00
    python tests/golden/make_vqa.py VQA/PythonEvaluationTools/vqaEvaluation/vqaEval.py

Run once; the tests read the file alone. The script is of Python 2: its two `print` statements are put into brackets.
"""

import gzip
import json
import random
import re
import sys
from pathlib import Path
from types import ModuleType

BASES = {
    "yes/no": ["yes", "no", "Yes", "no.", "yes!", "maybe", "can't tell", "cant tell", "none", "a yes"],
    "number": ["2", "two", "Two", "2.", "1,000", "1000", "10", "ten", "none", "zero", "0", "3.5", "3 . 5", ".5", "2-3", "50%"],
    "other": [
        "red", "the red", "a red", "Red.", "dark red", "red, white", "red,white", "red and white", "black/white", "t-shirt",
        "T shirt", "dont know", "don't know", "isnt there", "theyre dogs", "they're dogs", "somebody'd", "somebodyd've",
        "ow's'at", "'ow'sat", "yalld've", "y'all'dve", "Im", "Id've", "let's", "couldnt've", "mr. smith", "u.s.a.", "U.S.",
        "5 o'clock", "5 oclock", "(left)", "left (side)", "a", "an", "the", "", " ", "?", "...", "a.b.c", "http://x.y", "50,5 cm",
        "dogs' bowls", "dog's bowl", "\"stop\"", "stop\nsign", "stop\tsign", "  stop  sign ", "stop;sign", "stop ;sign", "[x]", "x_y",
        "a_b _c", "x=1", "x = 1", "@home", "rock`n`roll", "what?!", "café", "naïve.", "½", "no one", "one of them", "<3", "{x}",
        "back\\slash", "1.000.000", "no. 5", "it's 3:30", "twas", "whove", "oclock", "NONE", "The A An", "1, 2, 3", "9,9 - 10",
        "." * 40 + "x", "x-y - z", "e-mail", "e -mail",
    ],
}  # fmt: skip


def one_set(rng: random.Random) -> dict:
    kind = rng.choice(list(BASES))
    pool = rng.sample(BASES[kind], rng.choice((1, 2, 3, 5)))
    weights = [rng.random() ** 2 + 0.05 for _ in pool]
    people = rng.choices(pool, weights, k=10)
    answer = rng.choice([*people, rng.choice(BASES[kind]), rng.choice(BASES["other"])])
    if rng.random() < 0.15:
        answer = rng.choice([answer.upper(), f"the {answer}", f"{answer}.", f"{answer},", answer.replace("'", "")])
    return {
        "question_type": rng.choice(("what", "is the", "how many")),
        "answer_type": kind,
        "people": people,
        "answer": answer,
    }


def main() -> None:
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    official = ModuleType("vqaEval")
    exec(re.sub(r'print (".*")', r"print(\1)", text), vars(official))
    rng = random.Random(0)
    sets = [one_set(rng) for _ in range(2000)]

    class Answers:
        def __init__(self, qa: dict):
            self.qa = qa

        def getQuesIds(self):  # noqa: N802 - the name that the script asks for
            return list(self.qa)

    truth = {
        number: {
            "question_type": row["question_type"],
            "answer_type": row["answer_type"],
            "answers": [{"answer": text, "answer_id": i + 1} for i, text in enumerate(row["people"])],
        }
        for number, row in enumerate(sets)
    }
    said = {number: {"answer": row["answer"]} for number, row in enumerate(sets)}
    script = official.VQAEval(Answers(truth), Answers(said), n=8)
    script.evaluate()
    for number, row in enumerate(sets):
        row["official"] = script.evalQA[number]
    content = json.dumps({"sets": sets, "accuracy": script.accuracy}, ensure_ascii=False, indent=0)
    out = Path(__file__).with_name("vqa.json.gz")
    out.write_bytes(gzip.compress(content.encode(), mtime=0))
    print(f"\n{out.name}: {out.stat().st_size:,} bytes, {script.accuracy}")


if __name__ == "__main__":
    main()
