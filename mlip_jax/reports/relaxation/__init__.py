"""Report of relaxations: results, figures and page."""
