"""What becomes of a traced graph: stripped, folded, merged, and proved equal in float64."""
