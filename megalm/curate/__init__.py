"""Documents in, documents out: what raw pages and text become before they are tokenised. No torch."""
