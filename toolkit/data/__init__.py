"""From rows of any format to tokens with a loss mask, and a ledger that accounts for each row."""
