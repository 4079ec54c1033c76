"""vLLM servers that the run starts, supervises and stops, and the cards they use."""
