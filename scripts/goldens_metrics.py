"""Makes crates/lowrank/tests/goldens/metrics.json and stems.json: scores of small corpora, and stems of words.

BLEU is sacrebleu's, NIST, METEOR and the stems are nltk's, ROUGE-L and CIDEr pycocoevalcap's. The last four are given the
tokens that sacrebleu's tokenizer makes, joined by spaces. METEOR is given a WordNet without synonyms.

It needs sacrebleu, nltk and pycocoevalcap. Run it from the repository's root:
python scripts/goldens_metrics.py [--check]
"""

import json
import sys
from pathlib import Path

from nltk.stem.porter import PorterStemmer
from nltk.translate.meteor_score import meteor_score
from nltk.translate.nist_score import corpus_nist
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from sacrebleu.metrics import BLEU

FOLDER = Path("crates/lowrank/tests/goldens")

RESTAURANTS = {
    "hypotheses": [
        "The Vaults is a pub near Café Adriatic with a 5 out of 5 rating. Prices start at £30.",
        "Blue Spice is a coffee shop in the city centre.",
        "The Cricketers serves cheap Japanese food, and it isn't family-friendly!",
        "Near the river you can find The Mill, a highly rated Italian restaurant for families.",
    ],
    "references": [
        [
            "The Vaults pub near Café Adriatic has a 5 star rating. Prices start at £30.",
            "Close to Café Adriatic, The Vaults is a highly rated pub; its prices start at £30.",
        ],
        [
            "A coffee shop in the city centre area called Blue Spice.",
            "Blue Spice is a coffee shop in city centre.",
            "In the city centre there's a coffee shop, Blue Spice.",
        ],
        ["The Cricketers offers Japanese food at low prices but is not family friendly."],
        [
            "The Mill is an Italian family restaurant by the riverside that is rated highly.",
            "You can find The Mill, which serves families Italian food, near the river. It rates highly.",
        ],
    ],
}

CASES = [
    {"name": "several references", **RESTAURANTS},
    {"name": "several references, lower case", "lowercase": True, **RESTAURANTS},
    {"name": "several references, as they are", "tokenize": "none", **RESTAURANTS},
    {
        "name": "one reference each",
        "hypotheses": RESTAURANTS["hypotheses"],
        "references": [references[:1] for references in RESTAURANTS["references"]],
    },
    {
        "name": "an empty hypothesis and an empty reference",
        "hypotheses": ["", *RESTAURANTS["hypotheses"][1:], ""],
        "references": [*RESTAURANTS["references"], [""]],
    },
    {
        "name": "short texts",
        "hypotheses": ["yes", "not at all", "a b c d"],
        "references": [["yes", "yes indeed"], ["not a bit"], ["a b c e"]],
    },
    {
        "name": "no order of four",
        "hypotheses": ["yes it is", "not at all"],
        "references": [["yes it is"], ["not at all", "none"]],
    },
    {
        "name": "nothing matches",
        "hypotheses": ["one two three four five", "six seven"],
        "references": [["un deux trois quatre cinq"], ["sechs sieben acht"]],
    },
    {
        "name": "one meaning",
        "hypotheses": RESTAURANTS["hypotheses"][:1],
        "references": RESTAURANTS["references"][:1],
    },
    {
        "name": "repeated words and other scripts",
        "hypotheses": [
            "the the the the the cat cat sat",
            "Ο Οδυσσεύς πλέει στη θάλασσα ΣΙΓΑ ΣΙΓΑ",
            "猫 は 猫 です 。 İstanbul’da ﬁne naïve\u00a0façade\u2003x",
            "running runner runs ran easily flies dying skies 3.5 1,000, -5 5-6 a.b &amp; &quot;x&quot; <skipped>y",
        ],
        "references": [
            ["the cat sat on the cat mat the end", "a cat cat"],
            ["ο οδυσσεύς πλέει αργά στη θάλασσα σιγά σιγά", "Οδυσσεύς σιγα"],
            ["猫 は 犬 です 。 istanbul’da fine naïve façade x"],
            ["run run runner easy fly die sky 3.5 1,000 - 5 5 - 6 a . b & \" x \" y"],
        ],
    },
]

WORDS = """
caresses ponies ties caress cats dies flies lies agreed feed plastered bled motoring sing conflated troubled sized hopping tanned
falling hissing fizzed failing filing happy sky skies enjoy enjoyment spy spied tried died try fly say by relational conditional
rational valenci hesitanci digitizer conformabli radicalli differentli vileli analogousli vietnamization predication operator
feudalism decisiveness hopefulness callousness formaliti sensitiviti sensibiliti triplicate formative formalize electriciti
electrical hopeful goodness revival allowance inference airliner gyroscopic adjustable defensible irritant replacement adjustment
dependent adoption homologou communism activate angulariti homologous effective bowdlerize probate rate cease controll roll
dying lying tying news innings inning outings outing cannings canning howe proceed exceed succeed proceeds archaeology geology
theology philology analogies apologies psychologically generally finally naturally carefully hopefully fully gradually especially
totally really equally family families friendly friendliness restaurant restaurants rated rating ratings riverside located locating
location prices priced pricing cheaply average moderately customers customer serving serves served dishes dish foods centre central
children childish kids welcoming welcomed highly highest lowly low excellent excellence excellently adults only located offering
offers offered reasonably reasonable affordable affordably expensive expense inexpensive venue venues eateries eatery dining dined
diner establishment establishments providing provides provider provision provisions situated situation close closely closed closing
near nearby nearest yards yes yesterday yyyy syzygy toy toys y ye yy yyy sayings boys buys buzzing bussed passing passed possess
possesses possession possessions agree agrees agreement agreeing decree decreed freed freeing bleed bleeding seeing see sees need
needed ski skiing skied skies species series bias biases gas gases bus buses atlas glasses lenses crises oases axes indices matrices
ing ed eed ied ies s ss sses ion tion ational al ll ell all alli balli totalli ralli logi xlogi aalogi fulli xfulli bli abli
multiply multiplied multiplies multiplication multiplier oscillate oscillators oscillation generalization generalizations
nationalism nationality nationalize nationally rationalization organisation organised organizer vietnamese fuzzy dizzy lazily
laziness beautify beautiful beautifully beauty beauties cafe cafés café naïve façade can't isn't o'clock well-known e-mail 5-star
hello's ÜBER Straße ΣΊΣΥΦΟΣ İstanbul RUNNING Controllable controlling controlled compelled compelling propelled rolled rolling
filled filling falls fell tell tells telling welled misspelled enrolled installs installed installation skillful skillfully
willfully wool woolly woollen hopped hoping hoped snowed snowing boxed boxing played playing plays at ate eat eats as is us on an
add added adding egg eggs odd odds inn inns ebb err erred ers aged aging used using use ought iced icing owed owing
""".split()


class NoSynonyms:
    """A WordNet that knows no word."""

    @staticmethod
    def synsets(_word):
        return []


def score(case):
    tokenize = case.get("tokenize", "13a")
    lowercase = case.get("lowercase", False)
    hypotheses, references = case["hypotheses"], case["references"]
    bleu = BLEU(tokenize=tokenize, lowercase=lowercase)
    most = max(map(len, references))
    columns = [[r[i] if i < len(r) else None for r in references] for i in range(most)]
    golden = bleu.corpus_score(hypotheses, columns)

    def tokens(text):
        return (bleu.tokenizer((text.lower() if lowercase else text).rstrip())).split()

    made = [tokens(text) for text in hypotheses]
    wanted = [[tokens(text) for text in texts] for texts in references]
    try:
        nist = corpus_nist(wanted, made, n=5)
    except ZeroDivisionError:
        nist = None  # No hypothesis has five tokens.
    joined = {i: [" ".join(words)] for i, words in enumerate(made)}
    joined_references = {i: [" ".join(words) for words in texts] for i, texts in enumerate(wanted)}
    meteor = [meteor_score(texts, words, wordnet=NoSynonyms()) for texts, words in zip(wanted, made)]
    return {
        "name": case["name"],
        "tokenize": tokenize,
        "lowercase": lowercase,
        "hypotheses": hypotheses,
        "references": references,
        "tokens": [" ".join(words) for words in made],
        "bleu": float(golden.score),
        "brevity_penalty": float(golden.bp),
        "nist": nist,
        "rouge_l": float(Rouge().compute_score(joined_references, joined)[0]),
        "meteor": sum(meteor) / len(meteor),
        "cider": float(Cider().compute_score(joined_references, joined)[0]),
    }


def main():
    stemmer = PorterStemmer()
    stems = [[word, stemmer.stem(word)] for word in sorted(set(WORDS))]
    files = {
        "metrics.json": json.dumps([score(case) for case in CASES], indent=1, ensure_ascii=False) + "\n",
        "stems.json": "[\n" + ",\n".join(json.dumps(s, ensure_ascii=False) for s in stems) + "\n]\n",
    }
    for name, text in files.items():
        path = FOLDER / name
        if "--check" in sys.argv[1:]:
            assert path.read_text(encoding="utf-8") == text, f"{path} differs"
        else:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
