#!/usr/bin/env python3
"""Cuts plots out of a comparison's page into one picture, side by side, for documents that cannot show the page.

    scripts/plot_images.py runs/e2e/comparison.html docs/results/e2e.png "Held-out loss" "Loss on validation rows"

A plot is named by its title. Needs Chromium: $CHROMIUM, or what is called so.
"""
import os, pathlib, re, subprocess, sys, tempfile

WIDTH = 582  # of a plot
# The page says in its title how tall it is.
MEASURE = "<script>document.title = document.querySelector('div').getBoundingClientRect().bottom</script>"


def page(source, titles):
    """The named figures under the page's own style."""
    style = re.search(r"<style>.*?</style>", source, re.S)
    figures = {}
    for figure in re.findall(r"<figure.*?</figure>", source, re.S):
        title = re.search(r"<figcaption><b>(.*?)</b>", figure, re.S)
        if title:
            figures[title.group(1)] = figure
    missing = [title for title in titles if title not in figures]
    if style is None or missing:
        sys.exit(f"no plot is called {', '.join(missing)}; there are: {', '.join(figures)}")
    body = "\n".join(figures[title] for title in titles)
    return f'<!doctype html><meta charset="utf-8">{style.group()}<div class="charts large" style="padding:4px">{body}</div>{MEASURE}'


def browse(html, width, height, *options):
    browser = os.environ.get("CHROMIUM", "chromium")
    options = ["--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={width},{height}", *options]
    return subprocess.run([browser, *options, html.as_uri()], check=True, capture_output=True, text=True).stdout


def main():
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    source, out, titles = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3:]
    with tempfile.TemporaryDirectory() as folder:
        html = pathlib.Path(folder, "plots.html")
        html.write_text(page(source.read_text(), titles))
        width = WIDTH * min(len(titles), 2)
        title = re.search(r"<title>([0-9.]+)</title>", browse(html, width, 1000, "--dump-dom"))
        browse(html, width, int(float(title.group(1))) + 1, f"--screenshot={out.absolute()}")


main()
