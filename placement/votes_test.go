package placement

import "testing"

func TestVotesOfGroup0(t *testing.T) {
	for members, want := range map[int]int{1: 2, 2: 2, 3: 3, 4: 3, 5: 5, 6: 5, 9: 5} {
		if votes := votesOf(&ClusterConfig{}, members); votes != want {
			t.Errorf("%d members with shards: %d votes, want %d", members, votes, want)
		}
	}
	if votes := votesOf(nil, 4); votes != fullVoters {
		t.Errorf("without shards: %d", votes)
	}
}
