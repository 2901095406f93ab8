"""A figure of every kind, with gaps, crowded names, and characters that are special in HTML."""

import math
from typing import Any

NAN = math.nan

FIGURES: dict[str, dict[str, Any]] = {
    "region": {
        "kind": "region",
        "title": "Where it fails",
        "k": [1, 2],
        "n_max": 6,
        "fails": [[False] * 3 + [True] * 4, [None, *[False] * 5, True]],
    },
    "curves": {
        "kind": "curves",
        "title": "Falling",
        "summary": "Two curves fall.",
        "xlabel": "n",
        "ylabel": "P(correct)",
        "series": [
            {"label": "k = 2", "x": [1, 2, 3, 4], "y": [1.0, None, NAN, 0.1], "low": [0.9, None, 0.2, 0.0],
             "high": [1.0, None, 0.4, 0.2]},
            {"label": "k = 3", "x": [1, 2, 3, 4], "y": [1.0, 1.0, 0.4, 0.1], "style": "dashed"},
            {"label": "seen", "x": [1, 2], "y": [0.5, None], "low": [0.4, None], "high": [0.6, None],
             "style": "points", "group": "k = 2"},
            {"label": "nothing was measured", "x": [1, 2], "y": [None, None]},
        ],
        "hlines": [{"y": 0.5, "label": "one half"}, {"y": None, "label": "nowhere"}],
        "vlines": [{"x": 2, "label": "first"}, {"x": 2.1, "label": "second"}, {"x": None, "label": "never"}],
    },
    "map": {
        "kind": "map",
        "title": "The plane",
        "xlabel": "n",
        "ylabel": "k",
        "x_edges": [0, 10, 20, 40],
        "y": ["2", "4"],
        "values": [[1.0, 0.5, 0.0], [None, NAN, 0.7]],
        "overlays": [
            {"label": "measured", "x": [12.0, None], "style": "points"},
            {"label": "a law", "x": [15.0, 99.0], "style": "line"},
            {"label": "a rival", "x": [None, None], "style": "dashed"},
        ],
    },
    "bars": {
        "kind": "bars",
        "title": "Fewest",
        "ylabel": "tokens",
        "labels": ["numbers", "an unmatched bracket in a comment"],
        "values": [12, None],
        "low": [10, None],
        "high": [15, None],
        "reference": [{"y": 12, "label": "d = 12"}, {"y": None, "label": "none"}],
    },
    "digraph": {
        "kind": "digraph",
        "title": "A machine",
        "start": True,
        "nodes": [{"label": "0", "note": "“]”"}, {"label": "a long name"}, {"label": "2"}],
        "edges": [{"src": 0, "dst": 1, "label": "a"}, {"src": 1, "dst": 1, "label": "a"},
                  {"src": 1, "dst": 1, "label": "[b]"}, {"src": 0, "dst": 1, "label": "[b]"}],
    },
    "eggbox": {
        "kind": "eggbox",
        "title": "Green's classes",
        "boxes": [{"cells": [[["a", "a a"]]], "group": [[True]], "above": []},
                  {"cells": [[["b"], ["a very long word, with $x$"]], [[*"cdefg"], ["h"]]],
                   "group": [[True, False], [False, True]], "above": [0]}],
    },
    "layered": {
        "kind": "layered",
        "title": "A circuit",
        "columns": [{"label": "0.attn.q", "nodes": ["0.attn.q:1", "0.attn.q:2"]}, {"label": "x", "nodes": ["x:3"]}],
        "edges": [{"src": "0.attn.q:1", "dst": "x:3", "kind": "weight", "weight": -0.5},
                  {"src": "0.attn.q:2", "dst": "x:3", "kind": "residual", "weight": None}],
        "sizes": {"x:3": 1.0},
    },
}  # fmt: skip
