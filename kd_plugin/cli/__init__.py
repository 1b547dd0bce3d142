"""The command kd-plugin, and what the launch scripts share."""
