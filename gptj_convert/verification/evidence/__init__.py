"""What a verification finds: bitwise comparisons, a diagnosis of differences, and the verdict."""
