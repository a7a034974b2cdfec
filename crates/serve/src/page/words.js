// A difference of two texts, word by word.

// The table of the longest common subsequence has one entry for each pair of words; this many take 32 MB.
const MOST_PAIRS = 16_000_000;

/** Splits a text into words with the white space that follows them. */
export function splitWords(text) {
  return text.match(/\s+|[^\s]+\s*/gu) ?? [];
}

/**
 * Compares two texts and returns `{ left, right }`, each a list of `{ text, common }` that joins to the text, or null
 * where the texts are too long. Words are equal where they are equal without the white space around them.
 */
export function diffWords(leftText, rightText) {
  const left = splitWords(leftText);
  const right = splitWords(rightText);
  const a = left.map((word) => word.trim());
  const b = right.map((word) => word.trim());
  let head = 0;
  while (head < a.length && head < b.length && a[head] === b[head]) head += 1;
  let tail = 0;
  while (tail < Math.min(a.length, b.length) - head && a.at(-1 - tail) === b.at(-1 - tail)) tail += 1;
  const common = commonPairs(a.slice(head, a.length - tail), b.slice(head, b.length - tail));
  if (!common) return null;
  const flags = (length, middle) =>
    Array.from({ length }, (_, i) => i < head || i >= length - tail || middle.has(i - head));
  return {
    left: runs(left, flags(left.length, common.left)),
    right: runs(right, flags(right.length, common.right)),
  };
}

// The positions, in each list, of a longest common subsequence.
function commonPairs(a, b) {
  const width = b.length + 1;
  if ((a.length + 1) * width > MOST_PAIRS) return null;
  const longest = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i -= 1) {
    for (let j = b.length - 1; j >= 0; j -= 1) {
      longest[i * width + j] =
        a[i] === b[j]
          ? longest[(i + 1) * width + j + 1] + 1
          : Math.max(longest[(i + 1) * width + j], longest[i * width + j + 1]);
    }
  }
  const found = { left: new Set(), right: new Set() };
  for (let i = 0, j = 0; i < a.length && j < b.length; ) {
    if (a[i] === b[j]) {
      found.left.add(i++);
      found.right.add(j++);
    } else if (longest[(i + 1) * width + j] >= longest[i * width + j + 1]) i += 1;
    else j += 1;
  }
  return found;
}

// Joins neighbours of one kind, so that a marked phrase is one mark.
function runs(words, flags) {
  const parts = [];
  words.forEach((word, i) => {
    const last = parts.at(-1);
    if (last && last.common === flags[i]) {
      last.text += word;
      last.words += 1;
    } else parts.push({ text: word, common: flags[i], words: 1 });
  });
  return parts;
}
