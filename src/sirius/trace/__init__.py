"""One generation, token by token, as a page of HTML: `collect.py` decodes and collects, `page.py` writes the page."""
