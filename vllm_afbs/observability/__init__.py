"""The metrics and status of a running server, and the switch that turns sparse attention off."""
