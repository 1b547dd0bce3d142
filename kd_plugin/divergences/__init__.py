"""distill.divergence: one closed-form definition each."""
