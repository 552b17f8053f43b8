"""What a trained model can do: generate, and be measured."""
