"""distill.exchange: what crosses the wire for the heads."""
