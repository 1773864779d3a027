"""What a running server tells, and the switch that turns sparse attention off."""
