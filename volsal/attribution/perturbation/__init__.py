"""What the score loses when parts of the scan are changed: boxes, random masks, labelled regions."""
