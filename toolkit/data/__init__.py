"""From rows of any format to tokens with a loss mask, and the ledger that accounts for every row."""
