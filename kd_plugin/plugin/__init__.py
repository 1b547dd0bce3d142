"""kd.attach: a student bound to its teacher."""
