// Package bootstrap gives a node its durable identity and forms a cluster out of fresh nodes.
//
// # Words
//
// An incarnation is one life of a data directory: a random number drawn when the directory is created, and
// drawn anew when the directory is lost. A node is fresh until it holds a bootstrap record (cluster id, settings,
// every member's name and incarnation); it is a member once it knows that a majority of those members hold the
// same record, or once a cluster has let it rejoin. A record that no majority holds is only a proposal: nobody
// has started raft on it.
//
// # Protocol
//
// Every node that is not a member asks all its peers for their Status, in rounds: one question at a time to each
// peer, never a second one before the first is answered or given up. It believes only what it asked for
// itself; nothing is pushed. A Status says whether the node is fresh, holds a record or is a member, and its
// view: which incarnation of each peer it heard last. After each round the node takes one step:
//
//	fresh    a peer is a member        the record names this incarnation: adopt it. The cluster knows the name:
//	                                   rejoin as a new incarnation. Else: refuse, this node has to join
//	fresh    a peer holds a record     adopt it if it names this very incarnation, else wait
//	fresh    all peers are fresh       the smallest name decides once all have answered in one round with equal
//	                                   settings and every view equals its own: it writes the record. Others wait
//	holding  a majority holds it too   finish: the cluster exists
//	holding  no majority ever can      abandon: draw a new incarnation, drop the record, be fresh
//	else                               wait, and log for whom
//
// "No majority ever can" means: all members have answered, none finished, and too few of them are still
// the incarnation that the record names without being bound to another record. A node writes before it
// answers: what a peer hears is durable.
//
// # Why there is one record
//
// Let d decide R and a later incarnation d' of the same node (d lost its disk) decide R'. Each node named in R' told
// d', after d' was born, that it was fresh and which incarnation of every other it had heard; all told the same.
// So at the birth of the youngest of them, all were fresh at once: R was held by nobody. After that R could only
// arrive in a late reply of an incarnation that is gone. But each of them had already heard that incarnation's
// successor, and answers from one peer arrive in the order they were asked for. So no incarnation named in R'
// ever holds R. Without the views (all nodes fresh, but asked at different moments) this is false.
//
// What follows from it, case by case, when a disk is lost or a process dies:
//
//   - The decider dies before it writes: nothing happened. It asks again.
//   - It dies after writing and before telling: it comes back holding the record, and tells.
//   - It loses its disk before anyone adopted: its new incarnation decides anew. Late copies of the old record are
//     refused, as shown above.
//   - It loses its disk after another adopted: it hears of the record and cannot decide. The others adopt
//     the old record from each other, finish if they are a majority, and the decider rejoins. If they can't be one
//     (two nodes, or several disks lost), they abandon it and all start over.
//   - A node that is named, but fresh, loses its disk: the same, it rejoins once the others have finished.
//   - A majority of the disks is lost after the cluster formed: the survivors are members, so no second
//     cluster is formed; the lost nodes wait to rejoin a cluster that has no quorum, until an operator decides.
//   - A node restarts with other settings (token, strategy, shards, names in --peers) while fresh: it draws a new
//     incarnation, so that nothing it said before can bind it. Once it holds a record, it refuses.
//   - Two nodes claim one name: the views differ, and nobody decides; or all others mean the same one, and
//     the second waits, then asks to rejoin, which is refused as long as the first reports.
//   - Different --peers, tokens or strategies: refused, with the flag named.
//
// # Files
//
// identity.json, bootstrap.json, replicas.json and addresses.json, each a versioned, checksummed envelope that is
// replaced atomically (temporary file, fsync, rename, fsync of the directory), and lock, which is held while the
// directory is open. replicas.json exists before identity.json, the record is written before the identity says
// member, and an abandoned record is removed after the identity has its new incarnation: a record that
// doesn't name the incarnation of a node that isn't a member is left over, and removed at start.
package bootstrap
