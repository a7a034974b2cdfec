"""Makes crates/lowrank/tests/goldens/classification.json: figures of classifiers.

Those of single labels and of several are scikit-learn's, correlations scipy's, and those of entities seqeval's. scikit-learn has no
expected calibration error; it is computed here from its definition. Rows are random, with fixed seeds, or made to be extreme.

It needs scikit-learn, scipy, seqeval and numpy. Run it from the repository's root:
python scripts/goldens_classification.py [--check]
"""

import json
import math
import random
import sys
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
from scipy import stats
from seqeval.metrics import sequence_labeling as seqeval
from sklearn import metrics as sklearn

PATH = Path("crates/lowrank/tests/goldens/classification.json")


def probabilities(rng, labels, peak=None):
    """Thousandths that add up to 1, so that they are short in a file."""
    weights = [rng.random() ** 3 for _ in range(labels)]
    if peak is not None:
        weights[peak] += 2 * rng.random()
    parts = [math.floor(1000 * weight / sum(weights)) for weight in weights]
    parts[parts.index(max(parts))] += 1000 - sum(parts)
    return [part / 1000 for part in parts]


def single_rows(seed, rows, labels, gold_labels=None, predicted_labels=None):
    rng = random.Random(seed)
    gold_labels = gold_labels or range(labels)
    gold = [rng.choice(gold_labels) for _ in range(rows)]
    made = []
    for label in gold:
        peak = label if rng.random() < 0.6 else rng.randrange(labels)
        row = probabilities(rng, labels, peak)
        if predicted_labels:
            # The highest moves to a label that may be predicted.
            top, wanted = row.index(max(row)), rng.choice(predicted_labels)
            row[top], row[wanted] = row[wanted], row[top]
        made.append(row)
    return {"labels": labels, "gold": gold, "probabilities": made}


SINGLE = {
    "two labels": single_rows(1, 40, 2),
    "three labels": single_rows(2, 50, 3),
    "seven labels": single_rows(3, 60, 7),
    "fifteen labels and few rows": single_rows(4, 12, 15),
    "a label that is never gold": single_rows(5, 30, 4, gold_labels=[0, 1, 3]),
    "a label that is never predicted": single_rows(6, 30, 4, predicted_labels=[1, 2, 3]),
    "a label that is neither": single_rows(7, 30, 4, gold_labels=[0, 3], predicted_labels=[0, 1, 3]),
    "constant predictions": single_rows(8, 20, 3, predicted_labels=[1]),
    "constant gold": single_rows(9, 20, 3, gold_labels=[2]),
    "two labels, only 0": single_rows(10, 5, 2, gold_labels=[0], predicted_labels=[0]),
    "two labels, only 1": single_rows(11, 5, 2, gold_labels=[1], predicted_labels=[1]),
    "two labels, gold 0 and predicted 1": single_rows(12, 5, 2, gold_labels=[0], predicted_labels=[1]),
    "one row, right": {"labels": 3, "gold": [2], "probabilities": [[0.1, 0.2, 0.7]]},
    "one row, wrong": {"labels": 3, "gold": [0], "probabilities": [[0.1, 0.2, 0.7]]},
    "all right and sure": {"labels": 2, "gold": [0, 1, 1], "probabilities": [[1, 0], [0, 1], [0, 1]]},
    "all wrong and sure": {"labels": 2, "gold": [1, 0, 0], "probabilities": [[1, 0], [0, 1], [0, 1]]},
    "equal probabilities": {
        "labels": 4,
        "gold": [0, 1, 2, 3, 1],
        "probabilities": [[0.25] * 4, [0.25] * 4, [0.5, 0, 0.5, 0], [0, 0.5, 0, 0.5], [0.2, 0.4, 0.4, 0]],
    },
    "borders of the bins": {
        "labels": 3,
        "gold": [0, 0, 0, 0, 0, 0],
        "probabilities": [[0.4, 0.4, 0.2], [0.6, 0.2, 0.2], [0.8, 0.1, 0.1], [0.2, 0.8, 0], [0.2, 0.6, 0.2], [1, 0, 0]],
    },
}


def calibration_error(gold, predicted, confidence):
    """Guo et al. (2017), with 15 bins, in exact arithmetic."""
    bins = {}
    for label, top, probability in zip(gold, predicted, confidence):
        probability = Fraction(float(probability))
        number = next(m for m in range(1, 16) if probability <= Fraction(m, 15))
        bins.setdefault(number, []).append((label == top, probability))
    error = Fraction(0)
    for rows in bins.values():
        accuracy = Fraction(sum(right for right, _ in rows), len(rows))
        mean = sum(probability for _, probability in rows) / len(rows)
        error += Fraction(len(rows), len(gold)) * abs(accuracy - mean)
    return float(error)


def label_scores(gold, predicted, labels):
    """Precision, recall, F1 and support of each label."""
    scores = sklearn.precision_recall_fscore_support(gold, predicted, labels=range(labels), zero_division=0)
    return [[*map(float, row[:3]), int(row[3])] for row in zip(*scores)]


def single(name, case):
    labels, gold = case["labels"], case["gold"]
    values = np.array(case["probabilities"], dtype=np.float32)
    predicted = values.argmax(axis=1).tolist()

    def f1(average):
        return float(sklearn.f1_score(gold, predicted, average=average, zero_division=0))

    return {
        "name": name,
        **case,
        "accuracy": float(sklearn.accuracy_score(gold, predicted)),
        "f1_binary": f1("binary") if labels == 2 else None,
        "f1_macro": f1("macro"),
        "f1_micro": f1("micro"),
        "f1_weighted": f1("weighted"),
        "matthews": float(sklearn.matthews_corrcoef(gold, predicted)),
        "expected_calibration_error": calibration_error(gold, predicted, values.max(axis=1)),
        "scores": label_scores(gold, predicted, labels),
        "confusion": sklearn.confusion_matrix(gold, predicted, labels=range(labels)).tolist(),
    }


def several_rows(seed, rows, labels, gold_share=0.4, predicted_share=0.4):
    rng = random.Random(seed)
    gold = [[int(rng.random() < gold_share) for _ in range(labels)] for _ in range(rows)]

    def probability(label):
        wanted = label if rng.random() < 0.8 else rng.random() < predicted_share
        return round(rng.random() / 2 + (0.5 if wanted and predicted_share else 0), 3)

    return {"gold": gold, "probabilities": [[probability(label) for label in row] for row in gold]}


SEVERAL = {
    "four labels": several_rows(1, 30, 4),
    "six labels, rare": several_rows(2, 30, 6, 0.1, 0.1),
    "one label": several_rows(3, 20, 1),
    "nothing is gold": several_rows(4, 10, 3, gold_share=0),
    "nothing is predicted": several_rows(5, 10, 3, predicted_share=0),
    "nothing at all": {"gold": [[0, 0], [0, 0]], "probabilities": [[0.1, 0.4], [0, 0.5]]},
    "one row": {"gold": [[1, 0, 1]], "probabilities": [[0.9, 0.1, 0.6]]},
    "a half is not predicted": {"gold": [[1, 0], [1, 1]], "probabilities": [[0.5, 0.5], [0.501, 0.5]]},
}


def several(name, case):
    gold = np.array(case["gold"])
    predicted = (np.array(case["probabilities"], dtype=np.float32) > 0.5).astype(int)
    if gold.shape[1] == 1:
        # scikit-learn takes one column for a vector of single labels, of which 1 is the only one to average over.
        def f1(average):
            return float(sklearn.f1_score(gold, predicted, labels=[1], average=average, zero_division=0))

        scores = label_scores(gold[:, 0], predicted[:, 0], 2)[1:]
    else:

        def f1(average):
            return float(sklearn.f1_score(gold, predicted, average=average, zero_division=0))

        scores = label_scores(gold, predicted, gold.shape[1])
    return {
        "name": name,
        **case,
        "exact_match": float(sklearn.accuracy_score(gold, predicted)),
        "f1_macro": f1("macro"),
        "f1_micro": f1("micro"),
        "f1_weighted": f1("weighted"),
        "scores": scores,
    }


def number_rows(seed, rows, outputs, digits=3, spread=1.0, centre=0.0, noise=0.5):
    rng = random.Random(seed)
    gold = [[round(rng.gauss(centre, spread), digits) for _ in range(outputs)] for _ in range(rows)]
    predicted = [[round(value + noise * rng.gauss(0, spread), digits) for value in row] for row in gold]
    return {"gold": gold, "predicted": predicted}


NUMBERS = {
    "one output": number_rows(1, 40, 1),
    "many equal values": number_rows(2, 60, 1, digits=0, spread=1.5),
    "three outputs": number_rows(3, 25, 3, digits=1),
    "far from 0": number_rows(4, 30, 1, centre=100000, digits=2),
    "large": number_rows(5, 30, 1, spread=1e12, digits=0),
    "unrelated": number_rows(6, 20, 1, noise=20),
    "two rows": {"gold": [[1.5], [2.0]], "predicted": [[3.25], [-1.0]]},
    "one row": {"gold": [[1.5]], "predicted": [[3.25]]},
    "constant gold": {"gold": [[0.1]] * 7, "predicted": [[0.1 * i] for i in range(7)]},
    "constant predictions": {"gold": [[0.1 * i] for i in range(7)], "predicted": [[0.1]] * 7},
    "one output of two is constant": {
        "gold": [[0.5 * i, 1] for i in range(6)],
        "predicted": [[i * i, 0.25 * i] for i in range(6)],
    },
    "opposite": {"gold": [[i] for i in range(9)], "predicted": [[-i] for i in range(9)]},
    "monotone but not linear": {"gold": [[i] for i in range(9)], "predicted": [[2**i] for i in range(9)]},
}


def numbers(name, case):
    gold = np.array(case["gold"], dtype=np.float32).astype(np.float64)
    predicted = np.array(case["predicted"], dtype=np.float32).astype(np.float64)

    def correlation(function, x, y):
        if len(x) < 2:
            return None  # scipy refuses it.
        value = float(function(x, y)[0])
        return None if math.isnan(value) else value

    return {
        "name": name,
        **case,
        "pearson": [correlation(stats.pearsonr, x, y) for x, y in zip(gold.T, predicted.T)],
        "spearman": [correlation(stats.spearmanr, x, y) for x, y in zip(gold.T, predicted.T)],
        "mean_squared_error": sklearn.mean_squared_error(gold, predicted, multioutput="raw_values").tolist(),
        "mean_absolute_error": sklearn.mean_absolute_error(gold, predicted, multioutput="raw_values").tolist(),
    }


def tag_rows(seed, rows, names, outside=0.4, right=0.8):
    """Tags in any order, valid or not, of which most are predicted."""
    rng = random.Random(seed)

    def tag():
        return "O" if rng.random() < outside else rng.choice(names)

    gold = [[tag() for _ in range(rng.randrange(1, 9))] for _ in range(rows)]
    predicted = [[name if rng.random() < right else tag() for name in row] for row in gold]
    return {"gold": [" ".join(row) for row in gold], "predicted": [" ".join(row) for row in predicted]}


def tags_of(prefixes, kinds):
    return [f"{prefix}-{kind}" for prefix in prefixes for kind in kinds]


TAGS = {
    "IOB2": tag_rows(1, 40, tags_of("BI", ["PER", "LOC", "MISC"])),
    "IO": tag_rows(2, 30, tags_of("I", ["PER", "LOC"])),
    "IOBES": tag_rows(3, 60, tags_of("BIES", ["PER", "LOC"]), outside=0.2),
    "BILOU": tag_rows(4, 40, tags_of("BILU", ["PER", "LOC"]), outside=0.2),
    "no types": tag_rows(5, 40, list("BIES"), outside=0.3),
    "dashes in types": tag_rows(6, 20, tags_of("BI", ["work-of-art", "work", "-"])),
    "tags with and without types": tag_rows(7, 40, ["B", "I", "E", "S", "B-X", "I-X", "E-X", "S-X"], outside=0.3),
    "unlike": tag_rows(8, 30, tags_of("BI", ["PER", "LOC"]), right=0),
    "a type that is never gold": {"gold": ["B-PER I-PER O", "O O"], "predicted": ["B-PER I-PER O", "B-LOC O"]},
    "a type that is never predicted": {"gold": ["B-PER O B-LOC"], "predicted": ["B-PER O O"]},
    "a lone I": {"gold": ["O I-PER I-PER O"], "predicted": ["O B-PER I-PER O"]},
    "nothing predicted": {"gold": ["B-PER I-PER O"], "predicted": ["O O O"]},
    "no entities": {"gold": ["O O", "O"], "predicted": ["O O", "O"]},
    "an empty row": {"gold": ["", "B-PER"], "predicted": ["", "B-PER"]},
    "entities end with their rows": {"gold": ["O B-PER", "I-PER O"], "predicted": ["O B-PER", "I-PER O"]},
    "names without prefixes": tag_rows(9, 40, ["PER", "ORG", "SPORT", "LOC"], outside=0.3),
}


def tags(name, case):
    gold = [row.split() for row in case["gold"]]
    predicted = [row.split() for row in case["predicted"]]
    accuracy = float(seqeval.accuracy_score(gold, predicted))
    if name == "names without prefixes":
        # seqeval would take their first letters for prefixes.
        gold, predicted = (
            [[tag if tag == "O" else f"I-{tag}" for tag in row] for row in rows] for rows in (gold, predicted)
        )

    def scores(average):
        values = seqeval.precision_recall_fscore_support(gold, predicted, average=average, zero_division=0)[:3]
        return [None if math.isnan(value) else float(value) for value in values]

    kinds = {kind for rows in (gold, predicted) for kind, _, _ in seqeval.get_entities(rows)}
    # Those are of the types in the order of their names.
    each = seqeval.precision_recall_fscore_support(gold, predicted, average=None, zero_division=0)
    types = [[kind, *map(float, row[:3]), int(row[3])] for kind, row in zip(sorted(kinds), zip(*each), strict=True)]
    return {
        "name": name,
        **case,
        "accuracy": accuracy,
        "micro": scores("micro"),
        "macro": scores("macro"),
        "types": types,
    }


def main():
    warnings.simplefilter("ignore")  # Of divisions by 0, and of tags that seqeval does not know.
    groups = {
        "single_label": [single(*case) for case in SINGLE.items()],
        "multi_label": [several(*case) for case in SEVERAL.items()],
        "regression": [numbers(*case) for case in NUMBERS.items()],
        "tags": [tags(*case) for case in TAGS.items()],
    }
    lines = [
        f'"{name}": [\n' + ",\n".join(json.dumps(case, allow_nan=False) for case in cases) + "\n]"
        for name, cases in groups.items()
    ]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    if "--check" in sys.argv[1:]:
        assert PATH.read_text(encoding="utf-8") == text, f"{PATH} differs"
    else:
        PATH.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
