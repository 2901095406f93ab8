"""Pictures: from plain data to SVG that stands inline in a page, a file a kind."""
