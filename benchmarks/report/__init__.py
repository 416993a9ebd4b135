"""One record of everything that was measured, and what people read: Markdown, plots, a page."""
