"""Reports: the figures of a run, their plots, and the page that shows them."""
