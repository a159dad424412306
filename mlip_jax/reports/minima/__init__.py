"""Report of a search for minima: results and page."""
