"""What happens to an update on its way: who is asked, and what is done to what they answer."""
